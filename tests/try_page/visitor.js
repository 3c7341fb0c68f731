// Visits the page at /docs as far as Node can: its script runs with a document that has the page's ids, and with the
// server that it came from. Chooses a path, sends its first example, and prints what the page shows.
//
//   node visitor.js ORIGIN PATH BODY TOKEN FIELDS
//
// FIELDS is a JSON object: what is typed into the fields of the path and the query, by name. What is watched is stopped
// after its first event.
"use strict";
const vm = require("node:vm");

const [origin, path, body, token, typed] = process.argv.slice(2);

class Element {
  constructor(value) {
    this.value = value ?? "";
    this.textContent = "";
    this.disabled = false;
    this.children = [];
    this.listeners = {};
  }
  replaceChildren(...children) {
    this.children = children;
    this.value = children[0]?.value ?? "";
  }
  append(...children) { this.children.push(...children); }
  addEventListener(kind, listener) { this.listeners[kind] = listener; }
  tell(kind) { this.listeners[kind]({ preventDefault() {} }); }
}

async function until(is) {
  while (!is()) await new Promise((resume) => setImmediate(resume));
}

async function visit() {
  const page = await (await fetch(`${origin}/docs`)).text();
  const elements = new Map([...page.matchAll(/<[^>]*\bid="(\w+)"([^>]*)>/g)].map(
    ([, id, rest]) => [id, new Element(/value="([^"]*)"/.exec(rest)?.[1])]));
  const at = (id) => elements.get(id);
  const script = await (await fetch(`${origin}/docs/try.js`)).text();
  vm.runInNewContext(script, {
    document: { getElementById: at, createElement: () => new Element() },
    AbortController,
    TextDecoderStream,
    URLSearchParams,
    Option: class { constructor(text) { this.value = text; } },
    fetch: (where, call) => fetch(new URL(where, origin), call),
    performance,
  });
  await until(() => at("about").textContent !== "");
  const offered = at("path").children.map((one) => one.value);
  at("path").value = path;
  at("path").tell("change");
  const example = at("body").value;
  at("body").value = body || example;
  const fields = new Map(at("fields").children.map(({ children: [label] }) => [label.children[0].split(" ")[0], label.children[1]]));
  for (const [name, value] of Object.entries(JSON.parse(typed))) fields.get(name).value = value;
  at("token").value = token;
  at("timeout").value = "60S";  // the machine may have other work
  at("call").tell("submit");
  await until(() => !at("send").disabled || at("answer").textContent.includes("data: "));
  if (!at("stop").disabled) at("stop").tell("click");
  await until(() => !at("send").disabled);
  const [status, answer] = [at("status").textContent, at("answer").textContent];
  console.log(JSON.stringify({ offered, fields: [...fields.keys()], example, about: at("about").textContent, status, answer }));
}

visit();
