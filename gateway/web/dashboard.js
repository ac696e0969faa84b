"use strict";
// Everything that comes from outside becomes text nodes, never markup.
const $ = (id) => document.getElementById(id);
function el(tag, attrs, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attrs || {})) {
    if (v === undefined || v === null || v === false) continue;
    if (k === "onclick") e.addEventListener("click", v);
    else e.setAttribute(k, v === true ? "" : v);
  }
  e.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== ""));
  return e;
}
const idOf = (name) => name.slice(name.indexOf("/") + 1);
const base = new URL(document.body.dataset.baseUri);

class APIError extends Error {
  constructor(status, body) {
    super(body.message || "HTTP " + status);
    this.status = status;
    for (const d of body.details || []) {
      for (const v of d.fieldViolations || []) this.message += "\n" + v.field + ": " + v.description;
    }
  }
}
async function api(method, path, body) {
  const resp = await fetch(path, {
    method, body: body === undefined ? undefined : JSON.stringify(body),
    headers: body === undefined ? { Accept: "application/json" } : { Accept: "application/json", "Content-Type": "application/json" },
  });
  const text = await resp.text();
  let json = {};
  try { json = JSON.parse(text); } catch { /* not from us: the status says it */ }
  if (!resp.ok) throw new APIError(resp.status, json);
  return json;
}
async function listAll(path, field) {
  const all = [];
  let token = "";
  do {
    const page = await api("GET", path + "?pageSize=1000" + (token ? "&pageToken=" + encodeURIComponent(token) : ""));
    all.push(...(page[field] || []));
    token = page.nextPageToken;
  } while (token);
  return all;
}

function age(time) {
  const s = Math.max(0, (Date.now() - Date.parse(time)) / 1000);
  if (!time || isNaN(s)) return "";
  if (s < 60) return Math.floor(s) + " s";
  if (s < 3600) return Math.floor(s / 60) + " min";
  if (s < 86400) return Math.floor(s / 3600) + " h";
  return Math.floor(s / 86400) + " d";
}
function bytes(n) {
  n = Number(n);
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (n >= 1024 && i < units.length - 1) { n /= 1024; i++; }
  return (n >= 10 || i === 0 ? Math.round(n) : n.toFixed(1)) + " " + units[i];
}
const looks = {
  RUNNING: "ok", READY: "ok", STARTING: "busy", SUSPENDING: "busy", SUSPENDED: "off", PENDING: "wait", DELETING: "off",
  FAILED: "bad", LOST: "bad", NOT_READY: "bad",
};
const badge = (state) => el("span", { class: "badge " + (looks[state] || "off") },
  (state || "UNKNOWN").replace("_", " ").toLowerCase().replace(/^./, (c) => c.toUpperCase()));
const webURI = (s) => s.webUri || base.protocol + "//" + idOf(s.name) + "." + base.host + "/";
const chips = (labels) => {
  const all = Object.entries(labels || {}).sort();
  return all.length ? el("span", { class: "chips" }, all.map(([k, v]) => el("span", { class: "chip", title: v ? k + "=" + v : k }, v ? k + "=" + v : k))) : null;
};

// Rows are kept, and made anew only when what they show has changed: a click
// never hits a row that is being replaced.
function keyed(list, items, key, make, empty) {
  const rows = list.rows || (list.rows = new Map());
  const seen = new Set();
  if (!items.length) { rows.clear(); list.replaceChildren(empty()); return; }
  let at = null;
  for (const it of items) {
    const k = key(it), sig = JSON.stringify(it);
    seen.add(k);
    let row = rows.get(k);
    if (!row || row.sig !== sig) {
      const node = make(it);
      if (row) row.node.replaceWith(node);
      row = { node, sig };
      rows.set(k, row);
    }
    for (const t of row.node.querySelectorAll("[data-time]")) t.textContent = age(t.dataset.time);
    if ((at ? at.nextSibling : list.firstChild) !== row.node) list.insertBefore(row.node, at ? at.nextSibling : list.firstChild);
    at = row.node;
  }
  for (const [k, row] of rows) if (!seen.has(k)) { row.node.remove(); rows.delete(k); }
  while (at.nextSibling) at.nextSibling.remove();
}

function why(s) {
  const parts = [];
  if (s.reason) parts.push(el("span", { class: "mono" }, s.reason));
  if (s.message) parts.push(parts.length ? " — " : "", s.message);
  const p = s.progress;
  if (p) {
    if (p.detail || p.phase) parts.push(parts.length ? " · " : "", p.detail || p.phase);
    const total = Number(p.totalBytes), now = Number(p.currentBytes);
    if (total > 0) {
      parts.push(" (" + bytes(now) + " of " + bytes(total) + ")");
      parts.push(el("progress", { max: total, value: Math.min(now, total) }));
    } else if (s.state === "STARTING" || s.state === "SUSPENDING") parts.push(el("progress"));
  }
  if (s.restartCount > 0 && s.state !== "RUNNING") parts.push(" · restarted " + s.restartCount + "×");
  return parts.length ? el("div", { class: "why" + (looks[s.state] === "bad" ? " bad" : "") }, parts) : null;
}
const localOnly = "Files and chats are only on the disk of its node, and are lost with it. Sessions are kept when the server has object storage.";
const moment = (time) => new Date(time).toLocaleString([], { dateStyle: "medium", timeStyle: "medium", hour12: false });
const when = (time) => el("span", { "data-time": time, title: time }, age(time));
// Where a session is kept and how far it is saved, as parts of a line.
function storageParts(s) {
  const st = s.storage || {};
  if (st.mode === "LOCAL") return [el("span", { class: "warn note", title: localOnly, tabindex: 0, role: "note", "aria-label": "not persistent: " + localOnly }, "not persistent")];
  if (!st.persistent) return [];
  const parts = [st.mode.toLowerCase()];
  if (st.unsavedSince) parts.push(" · ", el("span", { class: "warn", title: st.message }, "unsaved for ", when(st.unsavedSince)));
  else if (st.checkpoint) parts.push(" · saved ", when(st.checkpoint.createTime), " ago");
  else parts.push(" · not saved yet");
  if (st.mountState === "MOUNT_FAILED") parts.push(" · ", el("span", { class: "warn", title: st.message }, "mount failed"));
  if (st.mountState === "REMOUNTING") parts.push(" · ", el("span", { class: "warn", title: st.message }, "remounting"));
  return parts;
}
// What can be done to a session in its state.
const can = (s) => ({
  suspend: ["PENDING", "STARTING", "RUNNING", "FAILED"].includes(s.state),
  resume: s.state === "SUSPENDED" || (s.state === "LOST" && !!(s.storage && s.storage.persistent)),
  save: s.state === "RUNNING" && !!(s.storage && s.storage.persistent),
  fork: s.state !== "DELETING" && !!(s.storage && s.storage.mode === "SNAPSHOT"),
  download: s.state !== "DELETING" && (s.state === "RUNNING" || !!(s.storage && s.storage.persistent)),
});
const wake = (s) => can(s).resume ? el("button", { type: "button", class: "wake", onclick: () => resume(s) }, "Resume")
  : el("button", { type: "button", class: "wake", disabled: !can(s).suspend, onclick: () => suspend(s) }, "Suspend");
function sessionRow(s) {
  const id = idOf(s.name);
  return el("div", { class: "row" },
    el("div", { class: "state" }, badge(s.state)),
    el("div", { class: "title" }, el("button", { class: "name", type: "button", title: "Events, logs, details", onclick: () => openDetail(id) }, id), chips(s.labels)),
    el("div", { class: "cell storage" }, storageParts(s)),
    el("div", { class: "cell" }, s.node ? idOf(s.node) : ""),
    el("div", { class: "cell num", "data-time": s.createTime || "", title: s.createTime || "" }, age(s.createTime)),
    el("div", { class: "acts" },
      el("a", { class: "button", href: webURI(s), target: "_blank", rel: "noopener" }, "Open"),
      wake(s),
      el("button", { type: "button", onclick: () => openDetail(id) }, "Details"),
      el("button", { type: "button", class: "quiet", disabled: s.state === "DELETING", onclick: () => askDelete(s) }, "Delete")),
    why(s),
    s.storage && s.storage.message ? el("div", { class: "why warn" }, "Storage: " + s.storage.message) : null);
}
function nodeRow(n) {
  const i = n.info || {};
  const size = [i.cpuMillis > 0 && Number(i.cpuMillis) / 1000 + " CPUs", i.memoryBytes > 0 && bytes(i.memoryBytes), i.architecture].filter(Boolean).join(" · ");
  return el("div", { class: "row" },
    el("div", { class: "state" }, badge(n.state)),
    el("div", { class: "title" }, el("span", { class: "name" }, idOf(n.name)), chips(n.labels)),
    el("div", { class: "cell" }, size),
    el("div", { class: "cell num" }, (n.sessionCount || 0) + (n.sessionCount === 1 ? " session" : " sessions")),
    el("div", { class: "cell num", "data-time": n.heartbeatTime || "", title: "Last heard of" }, age(n.heartbeatTime)),
    n.state === "READY" ? null : why(n));
}

let sessions = [], nodes = [], loaded = false;
function render() {
  const want = $("filter").value.trim().toLowerCase();
  const shown = sessions.filter((s) => !want || JSON.stringify([idOf(s.name), s.state, s.node, s.labels, s.reason]).toLowerCase().includes(want));
  keyed($("sessions"), shown, (s) => s.name, sessionRow, () => want && sessions.length
    ? el("div", { class: "empty" }, "No session matches the filter.")
    : el("div", { class: "empty" }, el("strong", {}, "No sessions yet"), "Create one here, or run ", el("code", {}, "cloudcode session create"), "."));
  keyed($("nodes"), nodes, (n) => n.name, nodeRow, () => el("div", { class: "empty" }, el("strong", {}, "No nodes yet"), "Sessions wait until a machine runs ", el("code", {}, "cloudcode nodeagent"), "."));
  const running = sessions.filter((s) => s.state === "RUNNING").length;
  $("summary").textContent = running + " of " + sessions.length + " running · " + nodes.filter((n) => n.state === "READY").length + " of " + nodes.length + " nodes ready";
  if (current) showHead();
}
function banner(text) { $("banner").textContent = text; $("banner").hidden = !text; }

let timer = 0, polling = false;
async function poll() {
  clearTimeout(timer);
  if (polling) return;
  polling = true;
  try {
    if (!document.hidden || !loaded) {
      [sessions, nodes] = await Promise.all([listAll("/v1/sessions", "sessions"), listAll("/v1/nodes", "nodes")]);
      loaded = true;
      banner("");
      render();
    }
  } catch (e) {
    banner(e instanceof APIError ? e.message.split("\n")[0] : "This gateway cannot be reached. Trying again…");
  } finally {
    polling = false;
    timer = setTimeout(poll, 2000);
  }
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
$("filter").addEventListener("input", render);

// Details of one session.
let current = "", tab = "events", close = () => {};
const tabs = [...document.querySelectorAll("[data-tab]")];
function openDetail(id) {
  if (location.hash !== "#/sessions/" + id) { location.hash = "#/sessions/" + id; return; }
  current = id;
  if (!$("detail").open) $("detail").showModal();
  showHead();
  select("events");
}
function showHead() {
  const s = sessions.find((s) => idOf(s.name) === current);
  $("d-title").textContent = current;
  $("d-open").hidden = !s;
  if (!s) { $("d-sub").replaceChildren("This session is gone."); $("d-acts").replaceChildren(); $("d-acts").sig = ""; return; }
  $("d-open").href = webURI(s);
  const text = [s.reason, s.message, s.progress && s.progress.detail].filter(Boolean).join(" — ");
  $("d-sub").replaceChildren(badge(s.state), el("span", {}, [s.node && "on " + idOf(s.node), s.opencodeVersion && "OpenCode " + s.opencodeVersion, "generation " + s.generation].filter(Boolean).join(" · ") + (text ? " · " : ""), text),
    el("span", {}, s.storage && s.storage.uri ? ["Kept in ", el("span", { class: "mono" }, s.storage.uri), " · "] : "", storageParts(s), s.storage && s.storage.mode === "LOCAL" ? " · " + localOnly : ""));
  const acts = [wake(s)];
  if (s.storage && s.storage.persistent) {
    acts.push(el("button", { type: "button", disabled: !can(s).save, onclick: (e) => save(s, e.target) }, "Save now"));
    acts.push(el("button", { type: "button", disabled: !can(s).fork, title: s.storage.mode === "SNAPSHOT" ? null : "Only for storage mode snapshot", onclick: () => fork(s, "") }, "Fork"));
  }
  if (can(s).download) acts.push(el("a", { class: "button", href: archive(s, ""), download: "" }, "Download"));
  // Buttons are kept while they mean the same: a click never hits one that is being replaced.
  const sig = JSON.stringify([s.name, can(s), s.storage && s.storage.mode]);
  if ($("d-acts").sig !== sig) { $("d-acts").replaceChildren(...acts); $("d-acts").sig = sig; }
  for (const t of $("p-checkpoints").querySelectorAll("[data-time]")) t.textContent = age(t.dataset.time);
  const newest = s.storage && s.storage.checkpoint ? s.storage.checkpoint.id : "";
  if (tab === "checkpoints" && newest !== shownCheckpoint) listCheckpoints(s);
  const spec = JSON.stringify(s, null, 2);
  if ($("p-spec").textContent !== spec) $("p-spec").textContent = spec;
}
function select(name) {
  close();
  close = () => {};
  tab = name;
  for (const b of tabs) {
    b.setAttribute("aria-selected", b.dataset.tab === name);
    $("p-" + b.dataset.tab).hidden = b.dataset.tab !== name;
  }
  $("d-status").textContent = "";
  if (name === "events") followEvents(current);
  if (name === "logs") followLogs(current);
  if (name === "checkpoints") {
    const s = sessions.find((s) => idOf(s.name) === current);
    if (s) listCheckpoints(s);
  }
}
for (const b of tabs) b.addEventListener("click", () => select(b.dataset.tab));
$("d-close").addEventListener("click", () => $("detail").close());
$("detail").addEventListener("close", () => {
  close();
  close = () => {};
  current = "";
  if (location.hash) history.replaceState(null, "", location.pathname + location.search);
});
$("detail").addEventListener("click", (e) => { if (e.target === $("detail") && e.clientX < $("detail").getBoundingClientRect().left) $("detail").close(); });

// Collects what comes and puts it in once a frame: a busy session has a thousand
// events a second. Stays at the end unless the reader has scrolled up.
function appender(pane, most, make) {
  let waiting = [], asked = false;
  const flush = () => {
    asked = false;
    const end = pane.scrollHeight - pane.scrollTop - pane.clientHeight < 40;
    if (waiting.length > most) waiting = waiting.slice(-most);
    pane.append(...waiting.map(make));
    waiting = [];
    while (pane.childNodes.length > most) pane.firstChild.remove();
    if (end) pane.scrollTop = pane.scrollHeight;
  };
  return (item) => { waiting.push(item); if (!asked) { asked = true; requestAnimationFrame(flush); } };
}
function describe(kind, data) {
  if (kind === "opencode") {
    const p = data.payload || data;
    const props = p.properties || p.data || {};
    const part = props.part || {};
    return [p.type || "event", part.type ? part.type + (part.tool ? " " + part.tool : "") + (part.text ? ": " + part.text : "") : props.delta || (props.status && props.status.type) || props.file || ""];
  }
  if (kind === "lifecycle") {
    const s = data.session || {};
    return [s.state || "lifecycle", [s.reason, s.message, s.progress && s.progress.detail].filter(Boolean).join(" — ")];
  }
  if (kind === "checkpointed") {
    const c = data.checkpoint || {};
    return ["saved", [c.trigger && "after " + c.trigger, Number(c.bytes) > 0 && bytes(c.bytes) + " in " + c.files + " files", c.id].filter(Boolean).join(" · ")];
  }
  return [kind, data.message || data.reason || ""];
}
function eventRow({ kind, id, at, raw }) {
  let data = {};
  try { data = JSON.parse(raw); } catch { data = { message: raw }; }
  const [title, text] = describe(kind, data);
  const row = el("details", { class: "ev " + kind },
    el("summary", {}, el("span", { class: "t mono" }, at), el("span", { class: "k" }, title), el("span", { class: "s" }, String(text))));
  row.addEventListener("toggle", () => { if (row.open && !row.querySelector("pre")) row.append(el("pre", {}, (id ? "id " + id + "\n" : "") + JSON.stringify(data, null, 2))); });
  return row;
}
function followEvents(id) {
  const pane = $("p-events"), status = $("d-status");
  pane.replaceChildren();
  const add = appender(pane, 400, eventRow);
  const src = new EventSource("/v1/sessions/" + encodeURIComponent(id) + "/events");
  src.onopen = () => { status.textContent = "● live"; };
  src.onerror = () => { status.textContent = src.readyState === EventSource.CLOSED ? "closed" : "connecting…"; };
  for (const kind of ["lifecycle", "opencode", "checkpointed", "gap", "end"]) {
    src.addEventListener(kind, (e) => {
      add({ kind, id: e.lastEventId, raw: e.data, at: new Date().toLocaleTimeString([], { hour12: false }) });
      if (kind === "end") { src.close(); status.textContent = "ended"; }
    });
  }
  close = () => src.close();
}
async function followLogs(id) {
  const pane = $("p-logs"), status = $("d-status"), abort = new AbortController();
  close = () => abort.abort();
  pane.replaceChildren();
  const add = appender(pane, 2000, (text) => document.createTextNode(text));
  try {
    const resp = await fetch("/v1/sessions/" + encodeURIComponent(id) + "/logs?follow=true&tailLines=500", { headers: { Accept: "text/plain" }, signal: abort.signal });
    if (!resp.ok) throw new APIError(resp.status, await resp.json().catch(() => ({})));
    status.textContent = "● live";
    const reader = resp.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      add(value);
    }
    status.textContent = "ended";
  } catch (e) {
    if (abort.signal.aborted) return;
    status.textContent = "";
    add((pane.childNodes.length ? "\n" : "") + (e instanceof APIError ? e.message : "The log broke off: " + e.message) + "\n");
  }
}

// Checkpoints of one session.
let shownCheckpoint = "";
const archive = (s, checkpoint) => "/v1/" + s.name + "/archive" + (checkpoint ? "?checkpoint=" + encodeURIComponent(checkpoint) : "");
async function listCheckpoints(s) {
  const pane = $("p-checkpoints"), id = idOf(s.name);
  shownCheckpoint = s.storage && s.storage.checkpoint ? s.storage.checkpoint.id : "";
  if (!s.storage || !s.storage.persistent) {
    pane.replaceChildren(el("div", { class: "empty" }, el("strong", {}, "No checkpoints"), localOnly));
    return;
  }
  let all;
  try {
    all = (await api("GET", "/v1/" + s.name + "/checkpoints?pageSize=100")).checkpoints || [];
  } catch (e) {
    if (current === id) pane.replaceChildren(el("div", { class: "empty", role: "alert" }, el("strong", {}, "The checkpoints cannot be listed"), e.message));
    return;
  }
  if (current !== id || tab !== "checkpoints") return;
  if (!all.length) {
    pane.replaceChildren(el("div", { class: "empty" }, el("strong", {}, "No checkpoints yet"), "One follows each turn of a chat."));
    return;
  }
  const snapshot = s.storage.mode === "SNAPSHOT", why = snapshot ? null : "Only for storage mode snapshot";
  pane.replaceChildren(el("table", { "aria-label": "Checkpoints of " + id },
    el("thead", {}, el("tr", {}, ["Saved", "After", "Files", "Size", "Sent"].map((h) => el("th", { scope: "col", class: ["Files", "Size", "Sent"].includes(h) ? "num" : null }, h)), el("th", { scope: "col" }, el("span", { class: "sr" }, "Actions")))),
    el("tbody", {}, all.map((c) => el("tr", {},
      el("td", {}, when(c.createTime), " ago, " + moment(c.createTime), el("div", { class: "id mono" }, c.id, c.node ? " on " + idOf(c.node) : ""), (c.notes || []).map((n) => el("div", { class: "warn" }, n))),
      el("td", {}, c.trigger), el("td", { class: "num" }, c.files), el("td", { class: "num" }, bytes(c.bytes)), el("td", { class: "num" }, bytes(c.uploadedBytes)),
      el("td", {}, el("div", { class: "acts" },
        el("button", { type: "button", disabled: !snapshot, title: why, "aria-label": "Restore " + c.id, onclick: () => restore(s, c) }, "Restore"),
        el("button", { type: "button", disabled: !snapshot, title: why, "aria-label": "Fork " + c.id, onclick: () => fork(s, c.id) }, "Fork"),
        el("a", { class: "button", href: archive(s, c.id), download: "", "aria-label": "Download " + c.id }, "Download"))))))));
}

// Questions before something is done, and what went wrong with what is not asked.
let todo = null;
function ask({ title, text, label, danger, field, run }) {
  todo = run;
  $("a-title").textContent = title;
  $("a-text").textContent = text;
  $("a-field").hidden = !field;
  $("a-label").textContent = field || "";
  $("a-form").reset();
  $("a-error").hidden = true;
  $("a-go").hidden = !run;
  $("a-go").textContent = label || "";
  $("a-go").className = danger ? "danger" : "primary";
  $("a-cancel").textContent = run ? "Cancel" : "Close";
  $("ask").showModal();
}
$("a-form").addEventListener("submit", async (ev) => {
  ev.preventDefault();
  if (!todo) { $("ask").close(); return; }
  $("a-error").hidden = true;
  $("a-go").disabled = true;
  try {
    await todo(ev.target.elements.value.value.trim());
    $("ask").close();
    poll();
  } catch (e) {
    fail($("a-error"), e);
  } finally {
    $("a-go").disabled = false;
  }
});
const act = (s, verb, body) => api("POST", "/v1/" + s.name + ":" + verb, body || {});
function suspend(s) {
  ask({
    title: "Suspend session " + idOf(s.name) + "?", label: "Suspend", run: () => act(s, "suspend"),
    text: "What runs in its container ends. Files and chats stay" + (s.storage && s.storage.persistent ? "; it is saved first, and then takes nothing on its node." : " on its node."),
  });
}
async function resume(s) {
  if (s.state === "LOST") {
    ask({
      title: "Resume session " + idOf(s.name) + " elsewhere?", label: "Resume elsewhere", danger: true, run: () => act(s, "resume"),
      text: "It goes on from its newest checkpoint on another node. Do this when " + idOf(s.node || "its node") + " is gone or cut off: what it has not saved is lost.",
    });
    return;
  }
  try {
    await act(s, "resume");
    poll();
  } catch (e) { ask({ title: "Session " + idOf(s.name) + " was not resumed", text: e.message }); }
}
async function save(s, button) {
  button.disabled = true;
  button.textContent = "Saving…";
  try {
    await act(s, "checkpoint");
    await poll();
    if (tab === "checkpoints" && current === idOf(s.name)) listCheckpoints(s);
  } catch (e) {
    ask({ title: "Session " + idOf(s.name) + " was not saved", text: e.message });
  } finally {
    button.disabled = false;
    button.textContent = "Save now";
  }
}
function restore(s, c) {
  ask({
    title: "Take session " + idOf(s.name) + " back?", label: "Restore", danger: true, run: () => act(s, "restore", { checkpoint: c.id }),
    text: "Its files and chats become as they were at " + moment(c.createTime) + " (" + c.id + "). It is saved as it is now first, so this can be undone the same way. Then its container starts anew.",
  });
}
function fork(s, checkpoint) {
  let requestId = newUUID();
  ask({
    title: "Fork session " + idOf(s.name), label: "Fork", field: "Id of the new session",
    text: "A new session begins with the files and chats of this one" + (checkpoint ? " as of checkpoint " + checkpoint : "") + ". The two then have nothing to do with each other.",
    run: async (id) => {
      let made;
      try {
        made = await act(s, "fork", { checkpoint, sessionId: id, requestId });
      } catch (e) {
        if (e instanceof APIError && e.status < 500) requestId = newUUID(); // as for a create
        throw e;
      }
      await poll();
      openDetail(idOf(made.name));
    },
  });
}

// Create and delete.
for (const d of document.querySelectorAll("dialog.modal")) {
  for (const b of d.querySelectorAll("[data-close]")) b.addEventListener("click", () => d.close());
}
function pairs(text, what) {
  const out = {};
  for (const line of text.split("\n")) {
    if (!line.trim()) continue;
    const i = line.indexOf("=");
    if (i < 1) throw new Error(what + ": “" + line + "” is not name=value");
    out[line.slice(0, i).trim()] = line.slice(i + 1);
  }
  return out;
}
function size(text, what) {
  if (!text.trim()) return undefined;
  const m = /^\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?\s*$/i.exec(text);
  if (!m) throw new Error(what + " must look like 512MiB or 4GiB");
  return String(Math.round(Number(m[1]) * (m[3] || !m[2] ? 1024 : 1000) ** " kmgt".indexOf((m[2] || " ").toLowerCase())));
}
function number(text, what, factor) {
  if (!text.trim()) return undefined;
  const n = Number(text);
  if (!(n > 0)) throw new Error(what + " must be a number above 0");
  return String(Math.round(n * factor));
}
const newUUID = () => {
  const b = crypto.getRandomValues(new Uint8Array(16)); // randomUUID wants https
  b[6] = (b[6] & 15) | 64;
  b[8] = (b[8] & 63) | 128;
  return [...b].map((x, i) => ([4, 6, 8, 10].includes(i) ? "-" : "") + x.toString(16).padStart(2, "0")).join("");
};
let requestID = "";
$("new").addEventListener("click", () => {
  $("c-form").reset();
  $("c-error").hidden = true;
  requestID = newUUID();
  $("create").showModal();
});
function fail(where, e) { where.textContent = e.message; where.hidden = false; }
$("c-form").addEventListener("submit", async (ev) => {
  ev.preventDefault();
  const form = ev.target, f = (name) => form.elements[name].value, button = form.querySelector("[type=submit]");
  $("c-error").hidden = true;
  button.disabled = true;
  try {
    const session = {
      labels: pairs(f("labels"), "Labels"),
      spec: {
        image: f("image").trim(), env: pairs(f("env"), "Environment"), opencodeConfig: f("config").trim(),
        resources: { cpuMillis: number(f("cpu"), "CPUs", 1000), memoryBytes: size(f("memory"), "Memory"), diskBytes: size(f("disk"), "Disk"), pids: number(f("pids"), "Processes", 1) },
      },
    };
    const storage = {};
    if (f("mode")) storage.mode = f("mode");
    if (f("profile").trim()) storage.profile = f("profile").trim();
    if (f("prefix").trim()) storage.prefix = f("prefix").trim();
    if (Object.keys(storage).length) session.spec.storage = storage;
    const query = new URLSearchParams({ requestId: requestID });
    if (f("id").trim()) query.set("sessionId", f("id").trim());
    const made = await api("POST", "/v1/sessions?" + query, session);
    $("create").close();
    await poll();
    openDetail(idOf(made.name));
  } catch (e) {
    // A refused request may be corrected; one whose answer got lost is repeated as it was.
    if (e instanceof APIError && e.status < 500) requestID = newUUID();
    fail($("c-error"), e);
  } finally {
    button.disabled = false;
  }
});
let victim = "";
function askDelete(s) {
  const id = idOf(s.name), kept = !!(s.storage && s.storage.persistent);
  victim = id;
  $("x-form").reset();
  $("x-text").textContent = kept ? "Its container stops and it leaves its node. What is stored of it stays, and can be recovered." : "Its container stops, and its workspace and chats are removed for good.";
  $("x-purge").hidden = !kept;
  $("x-uri").textContent = kept ? s.storage.uri : "";
  $("x-title").textContent = "Delete session " + id + "?";
  $("x-error").hidden = true;
  $("delete").showModal();
}
$("x-form").addEventListener("submit", async (ev) => {
  ev.preventDefault();
  try {
    await api("DELETE", "/v1/sessions/" + encodeURIComponent(victim) + "?allowMissing=true" + (ev.target.elements.purge.checked ? "&purgeStorage=true" : ""));
    $("delete").close();
    poll();
  } catch (e) { fail($("x-error"), e); }
});

function route() {
  const m = /^#\/sessions\/([a-z0-9-]+)$/.exec(location.hash);
  if (m) openDetail(m[1]);
  else if ($("detail").open) $("detail").close();
}
window.addEventListener("hashchange", route);
poll().then(route);
