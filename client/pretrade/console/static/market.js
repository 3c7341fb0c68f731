// The chart of a market: candles, the mid, a pane below, and decisions as links on it.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const EVERY_MS = 2000;
  const MARK_PX = 14;
  const market = document.getElementById("market");
  const prices = document.getElementById("prices");
  const below = document.getElementById("below");
  let data = null;
  let charts = [];

  const probe = document.body.appendChild(document.createElement("i"));
  probe.hidden = true;
  // The property itself has both colours; what is painted has the one that is in force.
  const colour = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };

  const tell = (id, text) => {
    const place = document.getElementById(id);
    if (!place) return;
    if (place.textContent !== text) place.textContent = text; // else it would be read out again and again
    place.hidden = !text;
  };

  // The time of a bar is where it begins; it is drawn from there to where the next one begins.
  const candles = (chart, colours) => {
    const { ctx } = chart;
    const left = (index) => chart.valToPos(data.time[index], "x", true);
    const top = (price) => chart.valToPos(price, "y", true);
    const width = Math.max(1, left(0) - chart.valToPos(data.time[0] - data.seconds, "x", true));
    ctx.save();
    ctx.beginPath();
    ctx.rect(chart.bbox.left, chart.bbox.top, chart.bbox.width, chart.bbox.height);
    ctx.clip();
    data.time.forEach((_, index) => {
      if (!data.whole[index]) {
        ctx.fillStyle = colours.partial;
        ctx.fillRect(left(index), chart.bbox.top, width, chart.bbox.height);
      }
      if (data.open[index] == null) return;
      const rises = data.close[index] >= data.open[index];
      const middle = left(index) + width / 2;
      ctx.fillStyle = rises ? colours.rise : colours.fall;
      ctx.fillRect(middle - 0.5, top(data.high[index]), 1, Math.max(1, top(data.low[index]) - top(data.high[index])));
      const body = [top(data.open[index]), top(data.close[index])].sort((one, other) => one - other);
      ctx.fillRect(middle - width * 0.35, body[0], width * 0.7, Math.max(1, body[1] - body[0]));
    });
    ctx.restore();
  };

  const place = (chart) => {
    const old = new Map([...chart.over.querySelectorAll(".mark")].map((mark) => [mark.dataset.of, mark]));
    const taken = new Map(); // how many marks a bar has on one side of it already
    for (const one of data.marks) {
      const index = data.time.indexOf(one.time);
      const price = (one.below ? data.low : data.high)[index] ?? data.mid_open[index];
      if (index < 0 || price == null) continue;
      const side = `${one.time} ${one.below}`;
      const number = taken.get(side) || 0;
      taken.set(side, number + 1);
      const away = (one.below ? 1 : -1) * (MARK_PX * (number + 0.7));
      const top = chart.valToPos(price, "y") + away;
      const of = `${one.time} ${one.glyph} ${one.below}`;
      const mark = old.get(of) || chart.over.appendChild(document.createElement("a")); // kept: it may be clicked just now
      old.delete(of);
      mark.dataset.of = of;
      mark.className = `mark ${one.tone}`;
      mark.href = one.href;
      mark.textContent = one.glyph;
      mark.title = one.label;
      mark.setAttribute("aria-label", one.label);
      mark.tabIndex = -1; // the table below has the same links for the keyboard
      mark.style.left = `${chart.valToPos(one.time + data.seconds / 2, "x")}px`;
      mark.style.top = `${Math.min(chart.over.clientHeight, Math.max(0, top))}px`;
    }
    old.forEach((mark) => mark.remove());
  };

  const priced = (_chart, value) => (value == null ? "–" : value.toFixed(data.digits));

  // With room for marks above and below the candles.
  const roomy = (_chart, low, high) => {
    const room = (high - low) * 0.15 || Math.abs(high) * 1e-4 || 1;
    return [low - room, high + room];
  };

  const options = (height, series, hooks, scale = {}) => {
    const axis = { stroke: colour("--faint"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
    return {
      height,
      tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "UTC"),
      cursor: { sync: { key: "market" }, drag: { x: false, y: false } },
      scales: { x: { range: () => [data.time[0], data.time[data.time.length - 1] + data.seconds] }, y: scale },
      axes: [
        { ...axis, values: data.seconds < 60 ? "{HH}:{mm}:{ss}" : "{HH}:{mm}", space: 70 },
        { ...axis, size: 76, values: (_chart, splits) => splits.map((value) => value.toLocaleString("en")) },
      ],
      series: [{ value: "{HH}:{mm}:{ss}" }, ...series],
      hooks,
    };
  };

  const make = (place, given, values) => new uPlot({ ...given, width: place.clientWidth }, values, place);

  const unseen = (label) => ({ label, stroke: colour("--ink"), paths: () => null, points: { show: false }, value: priced });

  const shown = () => [data.time, data.open, data.high, data.low, data.close, data.mid_open];

  const make_all = () => {
    const colours = { rise: colour("--good"), fall: colour("--bad"), partial: colour("--heat3") };
    const mid = { label: "mid", stroke: colour("--faint"), width: 1, points: { show: false }, value: priced };
    const series = [...["open", "high", "low", "close"].map(unseen), mid];
    const hooks = { drawAxes: [(chart) => candles(chart, colours)], draw: [place] };
    const height = Math.max(220, Math.min(360, innerHeight * 0.4));
    const accent = colour("--accent");
    const bars = uPlot.paths.bars({ size: [0.7], align: 1 });
    const line = { label: below.dataset.name, stroke: accent, width: 1.5, points: { show: false } };
    const shape = below.dataset.bars ? { ...line, fill: accent, paths: bars } : line;
    charts = [
      make(prices, options(height, series, hooks, { range: roomy }), shown()),
      make(below, options(150, [shape], {}), [data.time, data.pane]),
    ];
  };

  const forget = () => {
    charts.forEach((chart) => chart.destroy());
    charts = [];
  };

  const draw = () => {
    if (!data || !data.time.length) return forget();
    if (!charts.length) return make_all();
    charts[0].setData(shown());
    charts[1].setData([data.time, data.pane]);
  };

  const show = () => {
    draw();
    tell("bars-problem", data.problem);
    tell("pane-problem", data.pane_problem);
    tell("newest-bar", data.newest);
    tell("decisions-problem", data.missing);
    const rows = document.getElementById("market-rows");
    if (rows && !rows.contains(document.activeElement)) rows.innerHTML = data.rows; // else somebody is about to use a link
    const older = document.getElementById("older");
    older.hidden = !data.older;
    older.href = older.dataset.path + encodeURIComponent(data.older);
  };

  const look = async () => {
    try {
      const answer = await fetch(market.dataset.source, { headers: { "hx-request": "true" } });
      const leads = answer.headers.get("hx-redirect");
      if (leads) return location.assign(leads);
      if (!answer.ok) return tell("bars-problem", `The console answers ${answer.status}.`);
      data = await answer.json();
      document.getElementById("silent").hidden = true;
      show();
    } catch {
      document.getElementById("silent").hidden = false; // the next turn tries again
    }
  };

  const again = async () => {
    if (!document.hidden) await look();
    setTimeout(again, EVERY_MS);
  };

  const redraw = () => {
    forget();
    draw();
  };

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  document.querySelector("#colours select").addEventListener("change", redraw);
  let resized;
  addEventListener("resize", () => {
    clearTimeout(resized);
    resized = setTimeout(redraw, 200);
  });
  if (market.dataset.live) again();
  else look();
});
