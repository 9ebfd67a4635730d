"use strict";
// What comes from a run's files reaches the page as text alone: textContent, never innerHTML.

function data(id) {
  return JSON.parse(document.getElementById(id).textContent);
}

for (const chart of data("chart-data")) {
  const settings = { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  Plotly.newPlot(`chart-${chart.name}`, chart.figure.data, chart.figure.layout, settings);
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function showSamples({ samples, columns }) {
  const [pickRun, pickStep, pickColumn] = ["run", "step", "column"].map((name) => document.getElementById(`pick-${name}`));
  const list = document.getElementById("list");
  const page = document.getElementById("sample");
  const names = [...document.querySelectorAll(".summary tr td:first-child")].map((cell) => cell.textContent.trim());
  let opened = null;

  function fill(select, options, chosen) {
    select.replaceChildren(...options.map(([value, text]) => Object.assign(element("option", text), { value })));
    if (chosen !== undefined) select.value = chosen;
  }

  function verdict(sample) {
    const answered = sample.verdict;
    if (!answered) return element("span", sample.kind === "train" ? "training" : "not scored");
    const found = answered.answer === null ? "no answer" : `answer ${answered.answer}`;
    const expected = answered.correct || answered.expected === null ? "" : `, expected ${answered.expected}`;
    const error = answered.error ? `, verifier failed: ${answered.error}` : "";
    const text = `${answered.correct ? "right" : "wrong"}: ${found}${expected}${error}`;
    return element("span", text, answered.correct ? "right" : "wrong");
  }

  // From white to a strong blue; the text stays readable on it.
  function shade(value, full) {
    const share = Math.max(0, Math.min(1, value / full));
    return `rgba(86, 180, 233, ${share.toFixed(3)})`;
  }

  function token(sample, i) {
    const piece = sample.text[i];
    const made = element("span", piece === "" ? "\u25af" : piece.replace(/\n/g, "\u21b5\n"), "token");
    const said = [];
    for (const [name, { title, unit, full }] of Object.entries(columns)) {
      if (!(name in sample.columns)) continue;
      const value = sample.columns[name][i];
      said.push(`${title}: ${value === null ? "infinite" : value} ${unit}`);
      if (name === pickColumn.value) {
        if (value === null) made.classList.add("infinite");
        else made.style.backgroundColor = shade(value, full);
      }
      if ((name === "opener" || name === "uncertain") && value > 0) made.classList.add(name);
    }
    made.title = said.join("\n");
    return made;
  }

  function same(a, b) {
    return a.run === b.run && a.kind === b.kind && a.index !== null && a.index === b.index;
  }

  function open(sample) {
    opened = sample;
    const response = element("div", sample.response, "text response");
    response.append(...sample.text.map((_, i) => token(sample, i)));
    const line = element("p", `Step ${sample.step}, ${sample.kind}${sample.index === null ? "" : ` ${sample.index}`}, `);
    line.append(verdict(sample));
    if (sample.truncated) line.append(", cut by the length limit");
    if (!sample.on_policy) line.append(", read from the data");
    const others = samples.filter((other) => same(other, sample) && other.step !== sample.step);
    const parts = [line, element("h4", "Prompt"), element("div", sample.prompt, "text"), element("h4", "Response"), response];
    if (others.length && sample.kind === "validation") {
      const links = element("p", "The same prompt at step ");
      for (const other of others) {
        const button = element("button", other.step);
        button.onclick = () => { pickStep.value = other.step; showList(other); };
        links.append(button, " ");
      }
      parts.push(links);
    }
    page.replaceChildren(...parts);
    for (const button of list.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.sample) === samples.indexOf(sample)));
    }
  }

  function showList(chosen) {
    const found = samples.filter((s) => s.run === Number(pickRun.value) && s.step === Number(pickStep.value));
    list.replaceChildren(...found.map((sample) => {
      const item = document.createElement("li");
      const button = item.appendChild(document.createElement("button"));
      button.dataset.sample = samples.indexOf(sample);
      button.append(verdict(sample), document.createElement("br"), sample.prompt.slice(0, 200).replace(/\s+/g, " "));
      button.onclick = () => open(sample);
      return item;
    }));
    open(chosen ?? found[0]);
  }

  function showSteps() {
    const steps = new Set(samples.filter((s) => s.run === Number(pickRun.value)).map((s) => s.step));
    const ordered = [...steps].sort((a, b) => a - b);
    fill(pickStep, ordered.map((step) => [step, step]), ordered.at(-1));
    showList();
  }

  function showColour() {
    const { unit, full } = columns[pickColumn.value];
    const bar = element("span", "", "scale");
    bar.style.background = `linear-gradient(to right, ${shade(0, 1)}, ${shade(1, 1)})`;
    document.getElementById("scale").replaceChildren("0", bar, `${Number(full.toPrecision(3))} ${unit}`);
    if (opened) open(opened);
  }

  const runs = [...new Set(samples.map((s) => s.run))];
  fill(pickRun, runs.map((run) => [run, names[run]]));
  fill(pickColumn, Object.entries(columns).map(([name, { title }]) => [name, title]));
  pickRun.onchange = showSteps;
  pickStep.onchange = () => showList();
  pickColumn.onchange = showColour;
  showSteps();
  showColour();
}

const kept = data("sample-data");
if (kept.samples.length) showSamples(kept);
