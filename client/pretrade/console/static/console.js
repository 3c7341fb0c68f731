// What htmx does not do: charts, the live tail of decisions, keeping the place of whoever reads a part that is asked for
// anew, light and dark, and saying that the console itself does not answer.
"use strict";

(() => {
  const EVERY_MS = 10000;

  const probe = document.body.appendChild(document.createElement("i"));
  probe.hidden = true;
  // The property itself has both colours; what is painted has the one that is in force.
  const colour = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };

  const draw = (place, data) => {
    const lines = place.dataset.lines.split(" ");
    const names = place.dataset.names.split("|");
    const values = [data.time, ...lines.map((line) => data[line])];
    if (place.chart) {
      place.chart.setData(values);
      return;
    }
    const axis = { stroke: colour("--faint"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
    place.chart = new uPlot(
      {
        width: place.clientWidth,
        height: 180,
        tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "UTC"),
        scales: { y: { range: (_, low, high) => [0, high > 0 ? high * 1.1 : 1] } },
        axes: [{ ...axis, values: "{HH}:{mm}" }, { ...axis, size: 56 }],
        series: [
          { value: "{HH}:{mm}" },
          ...lines.map((_, index) => ({
            label: names[index],
            stroke: colour(index ? "--second" : "--accent"),
            width: 2,
            points: { show: true, size: 4 },
            value: (_chart, value) => (value == null ? "–" : value.toFixed(1)),
          })),
        ],
      },
      values,
      place,
    );
  };

  const forget = (place) => {
    if (place.chart) place.chart.destroy();
    place.chart = null;
  };

  const drawAll = async () => {
    const places = [...document.querySelectorAll("[data-chart]")];
    for (const source of new Set(places.map((place) => place.dataset.chart))) {
      try {
        const answer = await fetch(source, { headers: { "hx-request": "true" } });
        if (!answer.ok || !(answer.headers.get("content-type") || "").includes("json")) continue;
        const data = await answer.json();
        places.filter((place) => place.dataset.chart === source).forEach((place) => draw(place, data));
      } catch {
        // The next turn tries again; that the console is away, htmx's own calls say.
      }
    }
  };

  const redraw = () => {
    document.querySelectorAll("[data-chart]").forEach(forget);
    drawAll();
  };

  if (document.querySelector("[data-chart]")) {
    drawAll();
    setInterval(drawAll, EVERY_MS);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    let resized;
    addEventListener("resize", () => {
      clearTimeout(resized);
      resized = setTimeout(redraw, 200);
    });
  }

  const colours = document.getElementById("colours");
  const choice = colours.querySelector("select");
  colours.hidden = false;
  choice.value = document.documentElement.dataset.colours || "";
  choice.addEventListener("change", () => {
    document.documentElement.dataset.colours = choice.value;
    try {
      localStorage.setItem("colours", choice.value);
    } catch {
      // Then it holds for this page.
    }
    redraw();
  });

  // A part that is asked for anew replaces the link or the table in which somebody is just now.
  const called = (element) => element.id || element.getAttribute("href") || element.getAttribute("aria-label");
  const withName = (name) => [...document.querySelectorAll("main [id], main [href], main [aria-label]")].find((one) => called(one) === name);
  let focused = null;
  let scrolled = new Map();
  document.body.addEventListener("htmx:beforeSwap", () => {
    const active = document.activeElement;
    focused = active && document.getElementById("main").contains(active) ? called(active) : null;
    scrolled = new Map([...document.querySelectorAll(".wide")].map((one) => [called(one), one.scrollLeft]));
  });
  document.body.addEventListener("htmx:afterSettle", () => {
    for (const [name, left] of scrolled) {
      const table = left && withName(name);
      if (table && !table.scrollLeft) table.scrollLeft = left;
    }
    if (!focused || document.activeElement !== document.body) return;
    const again = withName(focused);
    if (again) again.focus({ preventScroll: true });
  });

  const MOST_ROWS = 200;
  const watch = document.getElementById("watch");
  if (watch) {
    const rows = document.getElementById("rows");
    const said = document.getElementById("live");
    let source = null;
    let leftOut = 0;
    const tell = (text) => {
      said.hidden = false;
      said.textContent = text;
    };
    const stop = (text) => {
      if (source) source.close();
      source = null;
      watch.setAttribute("aria-pressed", "false");
      watch.textContent = "Watch live";
      tell(text);
    };
    const start = () => {
      leftOut = 0;
      rows.replaceChildren();
      const none = document.getElementById("none");
      if (none) none.remove();
      watch.setAttribute("aria-pressed", "true");
      watch.textContent = "Stop";
      tell("Connecting …");
      source = new EventSource(watch.dataset.tail);
      source.addEventListener("begun", () => tell("Live: decisions appear as they become durable."));
      source.addEventListener("rows", (event) => {
        const batch = JSON.parse(event.data);
        const part = document.createElement("template");
        part.innerHTML = batch.rows;
        rows.prepend(part.content);
        while (rows.rows.length > MOST_ROWS) rows.deleteRow(-1);
        leftOut += batch.left_out;
        if (leftOut) tell(`Live. ${leftOut.toLocaleString("en")} more came than can be shown: narrow the filter to see all.`);
      });
      source.addEventListener("ended", (event) => stop(JSON.parse(event.data).why));
      source.onerror = () => tell("The connection is lost; trying again …");
    };
    watch.addEventListener("click", () => (source ? stop("Stopped.") : start()));
  }

  for (const form of document.querySelectorAll("form[data-go]")) {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      location.assign(form.dataset.go + encodeURIComponent(form.querySelector("input").value.trim()));
    });
  }

  const silent = document.getElementById("silent");
  document.body.addEventListener("htmx:sendError", () => {
    silent.hidden = false;
  });
  document.body.addEventListener("htmx:afterOnLoad", () => {
    silent.hidden = true;
  });
})();
