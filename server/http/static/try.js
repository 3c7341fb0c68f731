// The page at /docs: shows the paths of the port's OpenAPI document, and sends what is typed. It keeps nothing.
"use strict";

const at = (id) => document.getElementById(id);

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

function offer(select, names) {
  select.replaceChildren(...[...names].map((name) => new Option(name)));
}

function showPath(chosen) {
  const examples = examplesOf(chosen);
  offer(at("example"), examples.keys());
  at("example").disabled = at("body").disabled = examples.size === 0;
  at("token").disabled = chosen.operation.security?.length === 0;
  at("about").textContent = chosen.operation.description ?? chosen.operation.summary;
  showExample(chosen);
}

function showExample(chosen) {
  at("body").value = examplesOf(chosen).get(at("example").value) ?? "";
}

async function send({ path, verb }) {
  const headers = {};
  if (at("timeout").value) headers["grpc-timeout"] = at("timeout").value;
  if (at("token").value && !at("token").disabled) headers.authorization = `Bearer ${at("token").value.trim()}`;
  const call = { method: verb, headers, cache: "no-store" };
  if (verb === "POST") {
    headers["content-type"] = "application/json";
    call.body = at("body").value;
  }
  const began = performance.now();
  const answer = await fetch(path, call);
  const text = await answer.text();
  const took = (performance.now() - began).toFixed(1);
  at("status").textContent = `HTTP ${answer.status}, after ${took} ms in this browser`;
  at("answer").textContent = indented(text);
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
