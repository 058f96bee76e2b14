// The admin's page: it logs in with the code of the link that opened it, and shows the status every two seconds.
// Everything from the server is set as text.
"use strict";

const KEY = "sumus session";

async function ask(method, path, body, session) {
  const headers = session ? { authorization: `Bearer ${session}` } : {};
  if (body) headers["content-type"] = "application/json";
  const answer = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  return { status: answer.status, said: await answer.json() };
}

async function logIn() {
  const code = new URLSearchParams(location.hash.slice(1)).get("login");
  if (!code) return;
  history.replaceState(null, "", location.pathname); // the code is not to stay in the address
  const { status, said } = await ask("POST", "/v1/admin/login", { code });
  if (status === 200) sessionStorage.setItem(KEY, said.session);
  else throw new Error(said.detail || said.code);
}

const OPEN_END = 1000000; // an edge's round is of as many reports as the server above lets it add
const COLUMNS = ["", "", "round", "", "reports", "train", "dropped", ""];

function row(cells, trouble) {
  const line = document.createElement("tr");
  cells.forEach((said, place) => {
    const cell = line.insertCell();
    cell.textContent = said;
    cell.dataset.is = COLUMNS[place];
  });
  if (trouble) line.lastChild.className = "trouble";
  return line;
}

function items(list, lines) {
  list.replaceChildren(...lines.map((said) => {
    const line = document.createElement("li");
    line.textContent = said;
    return line;
  }));
}

function many(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

function amount(count) {
  if (count < 1000) return many(Math.round(count), "byte");
  for (const unit of ["kB", "MB", "GB"]) {
    count /= 1000;
    if (count < 999.95) return `${count.toFixed(1)} ${unit}`;
  }
  return `${(count / 1000).toFixed(1)} TB`;
}

function means(values) {
  return Object.entries(values).map(([name, value]) => `${name} ${value.toFixed(4)}`).join(", ");
}

function medians(values) {
  const said = Object.entries(values).map(([name, [low, high]]) => `${name} ${low === null ? `below ${high.toFixed(4)}` : high === null ? `above ${low.toFixed(4)}` : `${low.toFixed(4)} to ${high.toFixed(4)}`}`);
  return said.length ? `, the median device ${said.join(", ")}` : "";
}

// Of an edge: what became of the server above it; the whole text of what is wrong is shown to whoever points at it.
function above(edge) {
  const line = document.getElementById("above");
  line.hidden = !edge;
  if (!edge) return;
  const waiting = edge.waiting ? `, ${many(edge.waiting, "sum")} on the way` : "";
  line.className = edge.trouble ? "trouble" : "";
  line.title = edge.trouble;
  line.textContent = edge.trouble
    ? `The server above does not hear this edge: ${edge.why}${waiting}`
    : `An edge of ${edge.server}: ${many(edge.sums, "sum")} sent${waiting}`;
}

function show(now) {
  const said = document.getElementById("said");
  said.textContent = now.trouble
    ? `waiting for storage: ${now.trouble}`
    : `population ${now.population}: ${many(now.devices, "device")} enrolled, ${amount(now.bytes_in)} in, ${amount(now.bytes_out)} out`
      + (now.certificate_s !== null && now.certificate_s < 14 * 86400 ? `; the certificate ends in ${many(Math.floor(now.certificate_s / 86400), "day")}` : "");
  said.className = now.trouble ? "trouble" : "";
  above(now.above);
  document.getElementById("mode").textContent = now.mode;
  document.querySelector("table").hidden = false;
  document.querySelector("tbody").replaceChildren(...now.tasks.flatMap((task) => task.runs.map((run) => row([
    task.name, run.kind, run.round, run.paused ? "paused" : run.state, run.goal < OPEN_END ? `${run.counted} of ${run.goal}` : run.counted, run.out, run.dropped,
    run.waiting,
  ], run.trouble))));
  document.getElementById("refused").hidden = !now.refusals.length;
  items(document.querySelector("#refused ul"), now.refusals.map((each) => `${each.task ? `${each.task} ${each.kind}: ` : ""}${each.said}`));
  items(document.getElementById("models"), now.tasks.map((task) => {
    const measured = task.evaluated;
    return `${task.name}: version ${task.version}`
      + (!task.model ? "" : task.model.round === null ? "" : ` of ${many(task.model.contributors, "report")}`)
      + (task.released === task.version ? "" : `, devices answer with version ${task.released}`)
      + (measured ? `; version ${measured.version} measured on ${many(measured.evaluate.devices, "device")}: ${means(measured.evaluate.means)}${medians(measured.evaluate.medians || {})}` : "")
      + (task.influence ? `; ${task.influence.said}` : "")
      + `; no noise is added yet; its place would be ${task.noise_at === "top" ? "the top server" : "the edges"}`
      + (task.edge_rounds > 1 ? `; edges do ${task.edge_rounds} rounds of their own between two sums` : "");
  }));
}

async function look() {
  const session = sessionStorage.getItem(KEY);
  if (!session) throw new Error("not logged in: open the link that `sumus serve` or `sumus admin link` prints");
  const { status, said } = await ask("GET", "/v1/admin/status", undefined, session);
  if (status === 401) sessionStorage.removeItem(KEY);
  if (status !== 200) throw new Error(said.detail || said.code);
  show(said);
}

async function again() {
  let pause = 2000;
  try {
    await look();
  } catch (error) {
    const said = document.getElementById("said");
    said.textContent = error.message;
    said.className = "trouble";
    if (!sessionStorage.getItem(KEY)) return;
    pause = 5000;
  }
  setTimeout(again, pause);
}

logIn().then(again, (error) => {
  document.getElementById("said").textContent = error.message;
});
window.addEventListener("hashchange", () => location.reload());
