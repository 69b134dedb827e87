"use strict";
// State: `now` is the open video, `at` the second that is shown, `mark` where a segment starts, `pending`
// what waits for a name, `unsaved` what has not reached the disk.
const $ = (id) => document.getElementById(id);
const rows = new Map(), items = new Map(), seconds = new Map(), undos = [], unsaved = [];
let actions = [], version = 0, now = null, at = 0, playing = false, zoom = 1, layer = null;
let mark = null, pending = null, asking = false, found = null, heat = false, heated = "", drawing = 0, looking = 0, opening = 0, sending = false;
const CHUNKS = 90, UNIT = 112, NAMES = { top: 4, height: 26 }, MODEL = { top: 34, height: 56 };

async function get(path, parameters = {}, method = "GET") {
  const answer = await fetch(`${path}?${new URLSearchParams(parameters)}`, { method });
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}
const json = async (...asked) => (await get(...asked)).json();
const clock = (second) => `${Math.floor(second / 60)}:${(second % 60).toFixed(2).padStart(5, "0")}`;
const note = (text) => { $("note").textContent = text; };
const state = (text, bad = false) => { $("state").textContent = text; $("state").className = bad ? "bad" : ""; };
const quietly = (promise) => promise.catch((error) => note(error.message));
// What changes: segments, labels and progress, whoever made the change.
async function listen() {
  for (;;) {
    try {
      const news = await json("changes", { since: version });
      if (news.version < version) { version = 0; continue; }
      version = news.version;
      show(news);
      if (now === null) await quietly(open(initial()));
      else if (rows.get(now.name).version !== now.version) await refresh();
    } catch (error) {
      version = 0;
      state(`no answer from the server${unsaved.length ? `; ${unsaved.length} not saved` : ""}; trying again`, true);
      await new Promise((done) => setTimeout(done, 1000));
    }
  }
}
function initial() {
  let name = "";
  try { name = decodeURIComponent(location.hash.slice(1)); } catch { /* typed by hand */ }
  const good = [...rows.values()].find((row) => !row.problem) ?? rows.values().next().value;
  return rows.has(name) && !rows.get(name).problem ? name : good.name;
}
function show(news) {
  $("told").textContent = $("told").title = news.told;
  if (news.problem) state(news.problem, true);
  else if (!unsaved.length && $("state").className) state("saved");
  if (JSON.stringify(news.actions) !== JSON.stringify(actions)) {
    actions = news.actions;
    $("actions").replaceChildren(...actions.map((action, number) => {
      const [button, color, key] = ["button", "i", "kbd"].map((kind) => document.createElement(kind));
      color.style.background = action.color;
      key.textContent = number;
      button.append(color, action.name, ...(number < 10 ? [key] : []));
      button.onclick = () => { button.blur(); name(action.name); };
      return button;
    }));
    $("names").replaceChildren(...actions.map((action) => new Option(action.name)));
  }
  const added = document.createDocumentFragment();
  for (const row of news.videos) {
    if (!items.has(row.name)) {
      const item = Object.assign(document.createElement("li"), { role: "option", onclick: () => quietly(open(row.name)) });
      items.set(row.name, item);
      added.append(item);
    }
    rows.set(row.name, row);
    fill(items.get(row.name), row);
  }
  $("videos").append(added);
}
function fill(item, row) {
  const [line, title, share, strip] = ["b", "span", "small", "div"].map((kind) => document.createElement(kind));
  title.textContent = item.title = row.name;
  const percent = row.end ? Math.round(100 * row.labeled / row.end) : 0;
  share.textContent = row.ready ? (row.labeled ? `${percent || "<1"} %` : "") : row.share ? `encoding ${Math.round(100 * row.share)} %` : row.problem ? "" : "waiting";
  line.append(title, share);
  let from = 0;
  const parts = row.strip.map(([number, until]) => {
    const part = `${actions[number]?.color ?? "#333"} ${100 * from}% ${100 * until}%`;
    from = until;
    return part;
  });
  if (parts.length) strip.style.background = `linear-gradient(90deg, ${parts.join(", ")})`;
  if (row.problem) [strip.className, strip.textContent] = ["bad", row.problem];
  item.replaceChildren(line, strip);
}
// The open video and its pictures.
async function open(name, second = 0) {
  const number = ++opening, opened = await json("video", { name });
  // Another one was opened meanwhile.
  if (number !== opening) return;
  if (pending && pending.video !== name && !pending.all) leave();
  playing = false;
  [now, mark, heated, layer] = [opened, null, "", null];
  location.hash = encodeURIComponent(name);
  for (const [other, item] of items) item.setAttribute("aria-selected", other === name);
  items.get(name)?.scrollIntoView({ block: "nearest" });
  note("");
  await seek(second);
}
async function refresh() {
  const name = now.name, opened = await json("video", { name });
  if (now.name === name) { now = opened; layer = null; draw(); }
}
function pictures(k) {
  const key = `${now.name}\n${k}`;
  if (!seconds.has(key)) {
    seconds.set(key, load(now.name, k).catch((error) => { seconds.delete(key); throw error; }));
    for (const old of seconds.keys()) { if (seconds.size <= CHUNKS) break; seconds.delete(old); }
  }
  return seconds.get(key);
}
async function load(name, k) {
  const bytes = await (await get("second", { name, k })).arrayBuffer();
  const head = new Uint8Array(bytes).indexOf(10);
  const about = JSON.parse(new TextDecoder().decode(bytes.slice(0, head)));
  let begin = head + 1;
  const images = await Promise.all(about.sizes.map((size) => {
    const blob = new Blob([bytes.slice(begin, begin + size)], { type: "image/jpeg" });
    begin += size;
    return createImageBitmap(blob);
  }));
  return { times: about.times, images };
}
const last = () => Math.max(0, now.end - 0.5 / now.fps);
const latest = (times, second) => Math.max(0, times.findLastIndex((time) => time <= second + 1e-4));
async function seek(second) {
  at = Math.min(Math.max(0, second), last());
  draw();
  const { name } = now, wanted = at, chunk = await pictures(Math.floor(at));
  if (now.name === name && at === wanted) paint(chunk);
}
function paint(chunk) {
  const image = chunk.images[latest(chunk.times, at)], canvas = $("picture");
  if (!image) return;
  if (canvas.width !== image.width || canvas.height !== image.height) [canvas.width, canvas.height] = [image.width, image.height];
  canvas.getContext("2d").drawImage(image, 0, 0);
  canvas.dataset.second = at;
  if (heat && !playing) look();
}
async function step(frames) {
  // One place before or behind the frame that is shown.
  let k = Math.floor(at), { times } = await pictures(k);
  let place = latest(times, at) + frames;
  if (place < 0 && k > 0) { ({ times } = await pictures(--k)); place = times.length - 1 - (times.at(-1) >= at - 1e-4 ? 1 : 0); }
  else if (place >= times.length && k + 1 < now.end) { ({ times } = await pictures(++k)); place = times.findIndex((time) => time > at + 1e-4); }
  const time = times[Math.min(Math.max(place, 0), times.length - 1)];
  if (time !== undefined) await seek(time < k && frames > 0 ? k : time);
}
async function play() {
  playing = !playing;
  try { await playOn(); } finally { playing = false; }
  await seek(at);
}
async function playOn() {
  if (at >= last()) at = 0;
  let before = performance.now();
  while (playing) {
    const chunk = await pictures(Math.floor(at));
    for (const more of [1, 2]) if (at + more < now.end) pictures(Math.floor(at) + more).catch(() => 0);
    paint(chunk);
    draw();
    const time = await new Promise(requestAnimationFrame);
    // Nobody should miss what was not there yet.
    at = Math.min(last(), at + Math.min(0.1, (time - before) / 1000));
    before = time;
    if (at >= last()) playing = false;
  }
}
function look() {
  const action = own(at)?.[2] ?? said(at)?.action;
  if (!action) return note("the model says nothing here yet");
  const asked = `${now.name}\n${at}\n${action}`, number = ++looking;
  setTimeout(async () => {
    if (number !== looking || !heat || playing) return;
    note("looking ...");
    try {
      const answer = await get("picture", { name: now.name, second: at + 1e-4, heat: action });
      const image = await createImageBitmap(await answer.blob());
      if (!heat || number !== looking || `${now.name}\n${at}\n${action}` !== asked) return;
      $("picture").getContext("2d").drawImage(image, 0, 0, $("picture").width, $("picture").height);
      heated = asked;
      note(`bright: what speaks for ${action}`);
    } catch (error) { note(error.message); }
  }, 120);
}
// The timeline.
// The segment under the cursor; that which ends there, where no other begins.
const own = (second) => now.spans.find(([start, end]) => start <= second + 1e-4 && second + 1e-4 < end)
  ?? now.spans.find(([, end]) => Math.abs(end - second) < 0.5 / now.fps + 1e-3);
function said(second) {
  // The run of embeddings under the cursor that the model gives one action.
  if (!now.labels.length) return null;
  let place = Math.min(now.labels.length - 1, Math.max(0, now.edges.findLastIndex((edge) => edge <= second + 1e-4)));
  const number = now.labels[place], percent = now.percents[place];
  let [first, until] = [place, place + 1];
  while (first > 0 && now.labels[first - 1] === number) first--;
  while (until < now.labels.length && now.labels[until] === number) until++;
  // Beside what is labeled already.
  const start = Math.max(now.edges[first], ...now.spans.map(([, end]) => end <= second + 1e-4 ? end : 0));
  const end = Math.min(now.edges[until], ...now.spans.map(([start]) => start > second ? start : Infinity));
  return { start, end, action: actions[number]?.name, percent };
}
function view() {
  const length = now.end / zoom, from = Math.min(Math.max(0, at - length / 2), now.end - length);
  return { from, length };
}
function draw() {
  if (!drawing) drawing = requestAnimationFrame(() => { drawing = 0; if (now) drawLine(); });
}
function drawLine() {
  const canvas = $("line"), ratio = devicePixelRatio, width = canvas.clientWidth, { from, length } = view();
  const x = (second) => (second - from) / length * width;
  const key = `${width} ${from} ${length}`;
  if (!layer || layer.key !== key) {
    layer = Object.assign(new OffscreenCanvas(width * ratio, UNIT * ratio), { key });
    const pen = layer.getContext("2d");
    pen.scale(ratio, ratio);
    drawLayer(pen, x, from, length, width);
  }
  [canvas.width, canvas.height] = [width * ratio, UNIT * ratio];
  const pen = canvas.getContext("2d");
  pen.drawImage(layer, 0, 0);
  pen.scale(ratio, ratio);
  const waiting = pending?.video === now.name ? pending : mark !== null ? { start: Math.min(mark, at), end: Math.max(mark, at) } : null;
  pen.strokeStyle = pen.fillStyle = "#fff";
  pen.setLineDash([4, 3]);
  if (waiting) pen.strokeRect(x(waiting.start), NAMES.top, Math.max(2, x(waiting.end) - x(waiting.start)), NAMES.height);
  for (const change of unsaved) for (const [video, start, end, action] of change.add) {
    if (video !== now.name) continue;
    pen.strokeRect(x(start), NAMES.top, Math.max(2, x(end) - x(start)), NAMES.height);
    pen.fillText(`${action} (not saved)`, x(start) + 4, NAMES.top + 17);
  }
  pen.fillRect(x(at) - 1, 0, 2, UNIT);
  $("clock").textContent = `${clock(at)} / ${clock(now.end)}`;
}
function drawLayer(pen, x, from, length, width) {
  const color = (number) => actions[number]?.color ?? "#444";
  pen.font = "12px system-ui, sans-serif";
  for (const [start, end, action] of now.spans) {
    const number = actions.findIndex((each) => each.name === action), left = x(start), wide = Math.max(2, x(end) - left);
    if (left > width || left + wide < 0) continue;
    box(pen, left, NAMES.top, wide, NAMES.height, color(number), number);
    pen.save(); pen.beginPath(); pen.rect(left, NAMES.top, wide, NAMES.height); pen.clip();
    pen.fillStyle = number ? "#000" : "#fff";
    pen.fillText(action, Math.max(left, 0) + 4, NAMES.top + 17);
    pen.restore();
  }
  for (let place = 0; place < now.labels.length; place++) {
    const left = x(now.edges[place]), right = x(now.edges[place + 1]);
    if (right < 0 || left > width) continue;
    const tall = MODEL.height * (0.1 + 0.9 * now.percents[place] / 100);
    box(pen, left, MODEL.top + MODEL.height - tall, Math.max(0.6, right - left + 0.3), tall, color(now.labels[place]), now.labels[place]);
  }
  pen.fillStyle = "#aaa";
  if (!now.labels.length) pen.fillText(rows.get(now.name)?.problem || (now.ready ? "mark segments of two actions" : "encoding ..."), 8, MODEL.top + 30);
  const unit = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600].find((each) => each / length * width > 70) ?? 3600;
  for (let tick = Math.ceil(from / unit) * unit; tick <= from + length; tick += unit) {
    pen.fillRect(x(tick), 92, 1, 4);
    pen.fillText(clock(tick).replace(/\.00$/, ""), x(tick) + 3, 106);
  }
}
function box(pen, left, top, wide, tall, color, number) {
  pen.fillStyle = color;
  pen.fillRect(left, top, wide, tall);
  // There are eight colors; actions beyond have stripes, which every eye tells apart.
  if (number <= 8) return;
  pen.save();
  pen.beginPath(); pen.rect(left, top, wide, tall); pen.clip();
  [pen.strokeStyle, pen.lineWidth] = ["#0008", 2];
  pen.beginPath();
  for (let line = Math.floor((left - tall) / 7) * 7; line < left + wide; line += 7) { pen.moveTo(line, top + tall); pen.lineTo(line + tall, top); }
  pen.stroke();
  pen.restore();
}
const second = (event) => { const { from, length } = view(); return from + event.offsetX / $("line").clientWidth * length; };
$("line").onclick = (event) => quietly(seek(second(event)));
$("line").onmousemove = (event) => {
  const there = second(event), mine = own(there), model = said(there);
  $("hover").textContent = `${clock(there)}${mine ? `, you: ${mine[2]}` : ""}${model ? `, model: ${model.action} ${model.percent} %` : ""}`;
};
// Changes. They are sent one after the other, and again until they are on the disk.
// The answer is whether it was taken.
function change(remove, add, undone = false) {
  return new Promise((told) => {
    unsaved.push({ remove, add, undone, told });
    draw();
    if (unsaved.length === 1) send();
  });
}
function undo() {
  if (unsaved.length > 1 || (unsaved.length && !sending)) { unsaved.pop().told(false); draw(); }
  else if (unsaved.length) note("it is being saved, try again");
  else if (undos.length) { const back = undos.pop(); change(back.remove, back.add, true); }
  else note("nothing to undo");
}
async function send() {
  while (unsaved.length) {
    const { remove, add, undone, told } = unsaved[0];
    try {
      state("saving ...");
      sending = true;
      const answer = await fetch("edit", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ remove, add }) });
      if (answer.status >= 500) throw new Error(await answer.text());
      const text = await answer.text();
      unsaved.shift();
      if (answer.ok && !undone) undos.push(JSON.parse(text));
      state(unsaved.length ? "saving ..." : answer.ok ? "saved" : "");
      if (!answer.ok) note(`not saved: ${text}`);
      told(answer.ok);
      sending = false;
    } catch (error) {
      sending = false;
      state(`${unsaved.length} not saved: ${error.message}; trying again`, true);
      draw();
      await new Promise((done) => setTimeout(done, 1000));
    }
  }
  draw();
}
async function name(action) {
  action = action.trim();
  if (!action || !now) return;
  let spans;
  const there = own(at), model = said(at);
  if (pending?.all) spans = pending.all.map((each) => [each.video, each.start, each.end, action]);
  else if (pending) spans = [[pending.video, pending.start, pending.end, action]];
  else if (mark !== null) spans = [[now.name, Math.min(mark, at), Math.max(mark, at), action]];
  else if (there) spans = [[now.name, there[0], there[1], action]];
  else if (model) spans = [[now.name, model.start, model.end, action]];
  else return note("mark where it starts with i and where it ends with o");
  const [more, was] = [asking, pending];
  leave();
  const taken = await change([], spans);
  if (!taken && was && !pending && mark === null) {
    // Refused: it can be named again.
    const why = $("note").textContent;
    [pending, asking] = [was, more];
    $("name").value = action;
    $("name").focus();
    note(why);
    draw();
  } else if (taken && more && !pending) setTimeout(() => quietly(ask()), 400);
}
function leave() {
  [mark, pending, asking, found] = [null, null, false, null];
  [$("found").hidden, $("name").value] = [true, ""];
  $("name").placeholder = "i and o mark a segment";
  $("name").blur();
  note("");
  draw();
}
function await_name(span, guess, hint) {
  pending = span;
  $("name").value = guess ?? "";
  $("name").placeholder = "digit, or name and Enter";
  $("name").focus();
  $("name").select();
  note(hint);
  draw();
}
async function ask() {
  const moment = await json("ask");
  leave();
  await open(moment.video, moment.second);
  asking = true;
  await_name(moment, moment.action, moment.action ? `${moment.action}? Enter accepts, a digit or a name corrects; Esc and a: another moment` : "What is this? Type a name, or a digit");
}
async function similar() {
  const there = own(at), [start, end] = pending && !pending.all ? [pending.start, pending.end] : there ?? [Math.max(0, at - 0.5), Math.min(now.end, at + 0.5)];
  found = await json("similar", { name: now.name, start, end });
  found.action = there?.[2] ?? said(at)?.action;
  $("found").replaceChildren(...found.map((each) => {
    const button = document.createElement("button");
    const src = `picture?${new URLSearchParams({ name: each.video, second: each.second })}`;
    button.append(Object.assign(new Image(), { src, alt: "" }), `${clock(each.second)} ${each.video.slice(0, 18)}`);
    button.title = `${each.video}, cosine ${each.cosine}`;
    button.onclick = () => quietly(open(each.video, each.second).then(() => button.focus()));
    button.onkeydown = (event) => {
      if (event.key !== "Delete") return;
      found.splice(found.indexOf(each), 1);
      (button.nextSibling ?? button.previousSibling)?.focus();
      button.remove();
      event.stopPropagation();
    };
    return button;
  }));
  $("found").hidden = false;
  note(found.length ? "l labels them all, Delete leaves one out" : "nothing else is encoded yet");
  $("found").firstChild?.focus();
}
function look_on() {
  heat = !heat;
  $("heat").setAttribute("aria-pressed", heat);
  note("");
  quietly(seek(at));
}
async function save() {
  const { path } = await json("save", {}, "POST");
  note(`saved ${path}: python3 test_on_video.py --video_path x.avi --checkpoint_model ${path}`);
}
// Keys.
const KEYS = {
  " ": () => play(), ArrowLeft: (shift) => shift ? seek(at - 1) : step(-1), ArrowRight: (shift) => shift ? seek(at + 1) : step(1),
  Home: () => seek(0), End: () => seek(last()), ArrowUp: () => next(-1), ArrowDown: () => next(1),
  i: () => { mark = at; pending = null; note("go to its end, then o"); draw(); },
  o: () => {
    if (mark === null) return note("mark its start first, with i");
    await_name({ video: now.name, start: Math.min(mark, at), end: Math.max(mark, at) }, "", "Which action? A digit, or a name and Enter");
  },
  Enter: () => {
    const there = own(at), model = said(at);
    if (there) await_name({ video: now.name, start: there[0], end: there[1] }, there[2], "Another action for this segment?");
    else if (model) await_name({ video: now.name, ...model }, model.action, `${model.action}? Enter accepts, a digit or a name corrects`);
  },
  Delete: () => { const there = own(at); there ? change([[now.name, ...there]], []) : note("no segment of yours under the cursor"); },
  Escape: () => { leave(); if (heat) look_on(); },
  a: () => ask(), s: () => similar(), h: () => look_on(), "?": () => $("keys").showModal(),
  l: () => found?.length ? await_name({ all: found }, found.action, `All ${found.length}: which action?`) : note("find similar moments first, with s"),
  "+": () => { zoom = Math.min(4096, zoom * 2); layer = null; draw(); }, "-": () => { zoom = Math.max(1, zoom / 2); layer = null; draw(); },
};
async function next(way) {
  const all = [...rows.values()];
  let place = all.findIndex((row) => row.name === now.name) + way;
  while (all[place]?.problem) place += way;
  if (all[place]) await open(all[place].name);
}
document.onkeydown = (event) => {
  const typing = event.target === $("name"), input = $("name");
  if ($("keys").open || !now) return;
  const whole = !input.value || (input.selectionStart === 0 && input.selectionEnd === input.value.length);
  if (typing && event.key !== "Escape") {
    // A name may have digits in it, but begins with none that is a key.
    if (whole && /^\d$/.test(event.key) && actions[event.key]) { event.preventDefault(); name(actions[event.key].name); }
    return;
  }
  if ((event.ctrlKey || event.metaKey) && event.key === "z") {
    event.preventDefault();
    return undo();
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^\d$/.test(event.key)) { if (actions[event.key]) name(actions[event.key].name); return; }
  const key = event.key === "=" ? "+" : event.key.length === 1 ? event.key.toLowerCase() : event.key;
  // A button that has the focus is pressed.
  if (!KEYS[key] || (event.target.tagName === "BUTTON" && [" ", "Enter"].includes(key))) return;
  event.preventDefault();
  const done = KEYS[key](event.shiftKey);
  if (done instanceof Promise) quietly(done);
};
$("form").onsubmit = (event) => { event.preventDefault(); name($("name").value); };
for (const [id, key] of [["ask", "a"], ["similar", "s"], ["heat", "h"], ["help", "?"]]) $(id).onclick = () => { $(id).blur(); const done = KEYS[key](); if (done) quietly(done); };
$("save").onclick = () => { $("save").blur(); quietly(save()); };
new ResizeObserver(() => { layer = null; draw(); }).observe($("line"));
addEventListener("beforeunload", (event) => { if (unsaved.length) event.preventDefault(); });
listen();
