// The page at /docs: shows the paths of the port's OpenAPI document, and sends what is typed. It keeps nothing.
"use strict";

const at = (id) => document.getElementById(id);

/** Of what is watched, so many characters are shown: the newest. */
const MOST_SHOWN = 100_000;

/** The fields of the path and of the query, by their parameter; they change with the path that is chosen. */
let fields = new Map();

let stop = new AbortController();

/** Every operation by what is shown for it, such as `POST /v1/decide`; the short paths come first. */
function operationsOf(described) {
  const found = Object.entries(described.paths).flatMap(([path, verbs]) =>
    Object.entries(verbs).map(([verb, operation]) => ({ path, verb: verb.toUpperCase(), operation })));
  const isLong = ({ path }) => path.split("/").length > 2 && path.includes(".");
  found.sort((one, other) => isLong(one) - isLong(other));
  return new Map(found.map((one) => [`${one.verb} ${one.path}`, one]));
}

function examplesOf({ operation }) {
  const content = operation.requestBody?.content["application/json"];
  if (content === undefined) return new Map();
  const given = Object.values(content.examples ?? { none: { summary: "Empty", value: {} } });
  return new Map(given.map(({ summary, value }) => [summary, JSON.stringify(value, null, 2)]));
}

const isWatched = ({ operation }) => operation.responses["200"].content["text/event-stream"] !== undefined;

/** A field for each parameter that is no header. What must be there has its example in it already. */
function fieldsOf({ operation }) {
  const parameters = (operation.parameters ?? []).filter((one) => one.in === "path" || one.in === "query");
  return new Map(parameters.map((parameter) => {
    const input = document.createElement("input");
    const example = [parameter.example ?? []].flat().join(", ");
    input.value = parameter.required ? example : "";
    input.placeholder = example;
    input.title = parameter.description;
    input.required = parameter.required;
    return [parameter, input];
  }));
}

function labelled([{ name, required, schema }, input]) {
  const line = document.createElement("p");
  const label = document.createElement("label");
  const hints = [required ? "" : "optional", schema.type === "array" ? "several with commas" : ""].filter(Boolean);
  label.append(hints.length ? `${name} (${hints.join(", ")}) ` : `${name} `, input);
  line.append(label);
  return line;
}

/** The path with what is in the fields. */
function urlOf({ path }) {
  const query = new URLSearchParams();
  for (const [{ name, in: where, schema }, { value }] of fields) {
    const given = value.trim();
    if (where === "path") path = path.replace(`{${name}}`, encodeURIComponent(given));
    else if (given !== "") {
      const values = schema.type === "array" ? given.split(",").map((one) => one.trim()).filter(Boolean) : [given];
      for (const one of values) query.append(name, one);
    }
  }
  return query.size ? `${path}?${query}` : path;
}

function offer(select, names) {
  select.replaceChildren(...[...names].map((name) => new Option(name)));
}

function showPath(chosen) {
  const examples = examplesOf(chosen);
  offer(at("example"), examples.keys());
  at("example").disabled = at("body").disabled = examples.size === 0;
  at("token").disabled = chosen.operation.security?.length === 0;
  at("timeout").disabled = isWatched(chosen);
  fields = fieldsOf(chosen);
  at("fields").replaceChildren(...[...fields].map(labelled));
  at("about").textContent = chosen.operation.description ?? chosen.operation.summary;
  showExample(chosen);
}

function showExample(chosen) {
  at("body").value = examplesOf(chosen).get(at("example").value) ?? "";
}

async function send(chosen) {
  const { verb } = chosen;
  const headers = {};
  if (at("timeout").value && !at("timeout").disabled) headers["grpc-timeout"] = at("timeout").value;
  if (at("token").value && !at("token").disabled) headers.authorization = `Bearer ${at("token").value.trim()}`;
  stop = new AbortController();
  const call = { method: verb, headers, cache: "no-store", signal: stop.signal };
  if (verb === "POST") {
    headers["content-type"] = "application/json";
    call.body = at("body").value;
  }
  const began = performance.now();
  const answer = await fetch(urlOf(chosen), call);
  if (answer.headers.get("content-type") === "text/event-stream") {
    await show(answer);
    return;
  }
  const text = await answer.text();
  const took = (performance.now() - began).toFixed(1);
  at("status").textContent = `HTTP ${answer.status}, after ${took} ms in this browser`;
  at("answer").textContent = indented(text);
}

/** Shows events as they come, until somebody stops them or the server ends them. */
async function show(answer) {
  at("stop").disabled = false;
  at("status").textContent = `HTTP ${answer.status}; events come as they happen`;
  const text = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let piece = await text.read(); !piece.done; piece = await text.read()) {
      at("answer").textContent = (at("answer").textContent + piece.value).slice(-MOST_SHOWN);
    }
    at("status").textContent = "The server ended it.";
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    at("status").textContent = "Stopped.";
  } finally {
    at("stop").disabled = true;
  }
}

function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

async function begin() {
  const operations = operationsOf(await (await fetch("/openapi.json")).json());
  const chosen = () => operations.get(at("path").value);
  offer(at("path"), operations.keys());
  at("path").addEventListener("change", () => showPath(chosen()));
  at("stop").addEventListener("click", () => stop.abort());
  at("example").addEventListener("change", () => showExample(chosen()));
  at("call").addEventListener("submit", (event) => {
    event.preventDefault();
    at("send").disabled = true;
    at("status").textContent = "Sent; waiting.";
    at("answer").textContent = "";
    send(chosen())
      .catch((error) => { at("status").textContent = `No answer: ${error.message}`; })
      .finally(() => { at("send").disabled = false; });
  });
  showPath(chosen());
}

begin().catch((error) => { at("status").textContent = `The OpenAPI document cannot be read: ${error.message}`; });
