// The playground: talks to the API of the server it came from. What a model writes is only ever the text of a node, never HTML;
// the page's content security policy (runtime/server/playground_page.py) forbids the other way even to this script.
"use strict";

const byId = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const TOP = 5;  // alternatives shown for a token
const conversation = [];
let running = null;  // the AbortController of the request in flight

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// ---- theme

const darkSystem = matchMedia("(prefers-color-scheme: dark)");

function showTheme() {
  const choice = byId("theme").value;
  const dark = choice === "dark" || (choice === "system" && darkSystem.matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

function startTheme() {
  const known = localStorage.getItem("llmc-theme");
  if (["light", "dark"].includes(known)) byId("theme").value = known;
  byId("theme").addEventListener("change", () => {
    localStorage.setItem("llmc-theme", byId("theme").value);
    showTheme();
  });
  darkSystem.addEventListener("change", showTheme);
  showTheme();
}

// ---- requests

async function startModels() {
  try {
    const answer = await fetch("v1/models");
    const body = await answer.json();
    if (!answer.ok) throw new Error(body.error.message);
    for (const card of body.data) byId("model").append(element("option", "", card.id));
    byId("status").textContent = `context of ${body.data[0].max_model_len} tokens`;
  } catch (error) {
    byId("status").textContent = `no answer from the server: ${error.message}`;
  }
}

function requestBody(text) {
  const chat = byId("mode").value === "chat";
  const body = { model: byId("model").value, stream: true, stream_options: { include_usage: true }, return_metrics: true };
  for (const name of NUMBERS) {
    if (byId(name).value !== "") body[name] = Number(byId(name).value);
  }
  if (byId("stop").value !== "") body.stop = byId("stop").value;
  if (byId("probabilities").checked) Object.assign(body, chat ? { logprobs: true, top_logprobs: TOP } : { logprobs: TOP });
  if (!chat) return ["v1/completions", { ...body, prompt: text }];
  const system = byId("system").value.trim();
  const first = system ? [{ role: "system", content: system }] : [];
  return ["v1/chat/completions", { ...body, messages: [...first, ...conversation] }];
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// ---- tokens and their probabilities

// One form for both APIs: [{text, logprob, top: [{text, logprob}]}]
function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((entry) => ({
      text: entry.token,
      logprob: entry.logprob,
      top: entry.top_logprobs.map((other) => ({ text: other.token, logprob: other.logprob })),
    }));
  }
  return logprobs.tokens.map((text, index) => ({
    text,
    logprob: logprobs.token_logprobs[index],
    top: Object.entries(logprobs.top_logprobs[index] || {}).map(([other, logprob]) => ({ text: other, logprob })),
  }));
}

const tokensOfNode = new WeakMap();

function tokenNode(text, tokens) {
  const node = element("span", "token", text);
  if (tokens.length === 0) return node;
  const least = Math.exp(Math.min(...tokens.map((token) => token.logprob ?? 0)));
  node.classList.add("p" + [0.1, 0.3, 0.6, 0.9].filter((bound) => least >= bound).length);
  tokensOfNode.set(node, tokens);
  return node;
}

function percent(logprob) {
  return logprob === null ? "" : (100 * Math.exp(logprob)).toFixed(1) + " %";
}

function showTip(node) {
  const tip = byId("tip");
  const tokens = tokensOfNode.get(node);
  if (!tokens) {
    tip.hidden = true;
    return;
  }
  const table = element("table");
  const row = (token, className) => {
    const line = element("tr", className);
    line.append(element("td", "", JSON.stringify(token.text)), element("td", "", percent(token.logprob)));
    table.append(line);
  };
  for (const token of tokens) {
    row(token, "chosen");
    const others = token.top.filter((other) => other.text !== token.text).sort((a, b) => b.logprob - a.logprob);
    for (const other of others) row(other, "");
  }
  tip.replaceChildren(table);
  tip.hidden = false;
  const place = node.getClientRects()[0];
  const below = place.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(4, Math.min(place.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${below ? place.bottom + 6 : place.top - tip.offsetHeight - 6}px`;
}

// ---- one message on the page

class Message {
  constructor(role, text) {
    this.root = element("article", `message ${role}`);
    this.root.append(element("h2", "", role));
    this.body = element("pre");
    this.root.append(this.body);
    this.text = "";
    this.held = [];  // tokens whose text has not come yet
    if (text !== undefined) this.add(text, []);
    byId("log").append(this.root);
  }

  add(text, tokens) {
    this.held.push(...tokens);
    if (text === "") return;
    this.text += text;
    const fits = this.held.map((token) => token.text).join("") === text;
    const parts = fits ? this.held.map((token) => [token.text, [token]]) : [[text, this.held]];
    for (const [part, own] of parts) this.body.append(tokenNode(part, own));
    this.held = [];
    this.scroll();
  }

  think(text) {
    if (!this.thought) {
      const fold = element("details");
      fold.open = true;
      this.thought = element("pre");
      fold.append(element("summary", "", "reasoning"), this.thought);
      this.root.insertBefore(fold, this.body);
    }
    this.thought.append(text);  // a string becomes a text node
    this.held = [];
    this.scroll();
  }

  note(className, text) {
    this.root.append(element("p", className, text));
    this.scroll();
  }

  scroll() {
    const log = byId("log");
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
  }
}

function figures(end) {
  const parts = [];
  if (end.reason) parts.push(`ended by ${end.reason}`);
  if (end.usage) parts.push(`${end.usage.prompt_tokens} + ${end.usage.completion_tokens} tokens`);
  if (end.metrics && end.metrics.time_to_first_token_ms !== null) {
    parts.push(`first after ${end.metrics.time_to_first_token_ms.toFixed(0)} ms`);
    if (end.metrics.time_per_output_token_ms) parts.push(`${(1000 / end.metrics.time_per_output_token_ms).toFixed(0)} tokens/s`);
  }
  return parts.join(", ");
}

async function ask(text) {
  const chat = byId("mode").value === "chat";
  const turn = { role: "user", content: text };
  if (chat) conversation.push(turn);
  new Message("user", text);
  const [path, body] = requestBody(text);
  const message = new Message("assistant");
  const end = {};
  running = new AbortController();
  setRunning(true);
  try {
    const response = await fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) end.usage = chunk.usage;
      if (chunk.metrics) end.metrics = chunk.metrics;
      for (const choice of chunk.choices) {
        const delta = choice.delta || {};
        if (delta.reasoning) message.think(delta.reasoning);
        else message.add(delta.content ?? choice.text ?? "", tokensOf(choice.logprobs));
        if (choice.finish_reason) end.reason = choice.finish_reason;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") end.reason = "you";
    else message.note("error", error.message);
  } finally {
    running = null;
    setRunning(false);
    message.note("figures", figures(end));
    const place = conversation.indexOf(turn);  // gone if the conversation was cleared meanwhile
    if (place >= 0 && message.text) conversation.push({ role: "assistant", content: message.text });
    else if (place >= 0) conversation.splice(place);  // without an answer it is no turn
  }
}

// ---- the page

function setRunning(value) {
  byId("send").disabled = value;
  byId("stop-button").disabled = !value;
  byId("log").setAttribute("aria-busy", String(value));
}

function showMode() {
  const chat = byId("mode").value === "chat";
  byId("system-label").hidden = !chat;
  byId("input").placeholder = `Write a ${chat ? "message" : "text to be continued"}; Enter sends, Shift+Enter breaks the line`;
}

function showProbabilities() {
  byId("log").classList.toggle("plain", !byId("probabilities").checked);
  byId("legend").hidden = !byId("probabilities").checked;
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("input").value;
  if (running || text === "") return;
  byId("input").value = "";
  ask(text);
});
byId("input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});
byId("settings").addEventListener("submit", (event) => event.preventDefault());
byId("stop-button").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", () => {
  running?.abort();
  conversation.length = 0;
  byId("log").replaceChildren();
});
byId("mode").addEventListener("change", showMode);
byId("probabilities").addEventListener("change", showProbabilities);
byId("log").addEventListener("mouseover", (event) => showTip(event.target));
byId("log").addEventListener("click", (event) => showTip(event.target));
byId("log").addEventListener("mouseleave", () => { byId("tip").hidden = true; });
byId("log").addEventListener("scroll", () => { byId("tip").hidden = true; });
startTheme();
showMode();
showProbabilities();
startModels();
