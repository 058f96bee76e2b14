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

function row(cells, trouble) {
  const line = document.createElement("tr");
  for (const cell of cells) line.insertCell().textContent = cell;
  if (trouble) line.lastChild.className = "trouble";
  return line;
}

function means(values) {
  return Object.entries(values).map(([name, value]) => `${name} ${value.toFixed(4)}`).join(", ");
}

function medians(values) {
  const said = Object.entries(values).map(([name, [low, high]]) => `${name} ${low === null ? `below ${high.toFixed(4)}` : high === null ? `above ${low.toFixed(4)}` : `${low.toFixed(4)} to ${high.toFixed(4)}`}`);
  return said.length ? `, the median device ${said.join(", ")}` : "";
}

function show(now) {
  const said = document.getElementById("said");
  said.textContent = now.trouble
    ? `waiting for storage: ${now.trouble}`
    : `population ${now.population}: ${now.devices} devices enrolled, ${now.bytes_in} bytes in, ${now.bytes_out} bytes out`
      + (now.above ? `; an edge of ${now.above.server}: ${now.above.sums} sums sent` : "")
      + (now.certificate_s !== null && now.certificate_s < 14 * 86400 ? `; the certificate ends in ${Math.floor(now.certificate_s / 86400)} days` : "")
      + (now.above && now.above.trouble ? `; it does not hear: ${now.above.trouble}` : "");
  said.className = now.trouble ? "trouble" : "";
  document.getElementById("mode").textContent = now.mode;
  document.querySelector("table").hidden = false;
  document.querySelector("tbody").replaceChildren(...now.tasks.flatMap((task) => task.runs.map((run) => row([
    task.name, run.kind, run.round, run.paused ? "paused" : run.state, `${run.counted} of ${run.goal}`, run.out, run.dropped,
    run.waiting,
  ], run.trouble))));
  document.getElementById("models").replaceChildren(...now.tasks.map((task) => {
    const line = document.createElement("li");
    const measured = task.evaluated;
    line.textContent = `${task.name}: version ${task.version}`
      + (task.model ? ` of ${task.model.contributors} reports` : "")
      + (task.released === task.version ? "" : `, devices answer with version ${task.released}`)
      + (measured ? `; version ${measured.version} measured on ${measured.evaluate.devices} devices: ${means(measured.evaluate.means)}${medians(measured.evaluate.medians || {})}` : "")
      + (task.influence ? `; ${task.influence.said}` : "")
      + `; no noise is added yet, its place is ${task.noise_at === "top" ? "the top" : "at edges"}`
      + (task.edge_rounds > 1 ? `; edges do ${task.edge_rounds} rounds of their own between two sums` : "");
    return line;
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
