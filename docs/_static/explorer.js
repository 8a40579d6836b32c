// The interactive page: RECORDS (records.js) holds the benchmark's lines, Plotly draws them. Works from disk.
(function () {
  const keys = ["profile", "recogniser", "goal", "attack", "defence"];
  const select = Object.fromEntries([...keys, "view"].map((key) => [key, document.getElementById(key)]));
  const unique = (values) => [...new Set(values)];
  const dark = () => document.documentElement.dataset.theme === "dark";

  function lines(wanted) {
    return RECORDS.filter((line) => Object.entries(wanted).every(([key, value]) => line[key] === value));
  }

  function fill(key, values, fallback) {
    const before = select[key].value || fallback;
    select[key].replaceChildren(...values.map((value) => new Option(value, value)));
    if (values.includes(before)) select[key].value = before;
  }

  function choices() {
    fill("profile", unique(RECORDS.map((line) => line.profile)), "lfw");
    const here = lines({ profile: select.profile.value });
    fill("recogniser", unique(here.map((line) => line.recogniser)), "dlib");
    fill("goal", unique(here.map((line) => line.goal)), "dodging");
    const grid = here.filter((line) => line.way === "static" && !line.source);
    fill("attack", unique(grid.map((line) => line.attack)).filter((name) => name !== "noise"), "PGD");
    fill("defence", unique(grid.map((line) => line.defence)), "resgn");
  }

  function bars(rows, name) {
    return [{
      type: "bar", x: rows.map(name), y: rows.map((line) => line.right), marker: { color: "#2c6fb0" },
      error_y: {
        type: "data", symmetric: false, color: dark() ? "#ddd" : "#333",
        array: rows.map((line) => line.high - line.right), arrayminus: rows.map((line) => line.right - line.low),
      },
    }];
  }

  function draw() {
    choices();
    const view = select.view.value;
    document.getElementById("attack-label").hidden = view !== "attack";
    document.getElementById("defence-label").hidden = view !== "defence" && view !== "curve";
    const wanted = Object.fromEntries(["profile", "recogniser", "goal"].map((key) => [key, select[key].value]));
    const all = lines(wanted).filter((line) => !line.source);
    const main = RECORDS.find((line) => line.profile === wanted.profile).main_eps;
    const grid = all.filter((line) => line.way === "static" && line.eps_255 === main && line.attack !== "noise");
    let rows, data, title;
    if (view === "map") {
      rows = grid;
      const attacks = unique(grid.map((line) => line.attack));
      const defences = unique(grid.map((line) => line.defence)).reverse();
      const at = (defence, attack) => (grid.find((l) => l.defence === defence && l.attack === attack) || {}).right;
      const z = defences.map((defence) => attacks.map((attack) => at(defence, attack)));
      const text = z.map((row) => row.map((value) => (value === undefined ? "" : value.toFixed(0))));
      data = [{ type: "heatmap", x: attacks, y: defences, z, text, texttemplate: "%{text}", zmin: 0, zmax: 100, colorscale: "Cividis" }];
      title = `static attacks at ${main}/255`;
    } else if (view === "attack") {
      rows = grid.filter((line) => line.attack === select.attack.value);
      data = bars(rows, (line) => line.defence);
      title = `${select.attack.value}, static, at ${main}/255`;
    } else if (view === "defence") {
      rows = all.filter((line) => line.defence === select.defence.value && line.eps_255 === main && line.attack !== "noise");
      data = bars(rows, (line) => (line.way === "static" ? line.attack : `${line.attack}, ${line.way}`));
      title = `behind ${select.defence.value} at ${main}/255`;
    } else {
      rows = all.filter((line) => line.defence === select.defence.value && line.attack === "worst");
      rows.sort((a, b) => a.eps_255 - b.eps_255);
      const bare = all.filter((line) => line.defence === "none" && line.attack === "worst").sort((a, b) => a.eps_255 - b.eps_255);
      const trace = (part, name, dash) => ({
        type: "scatter", mode: "lines+markers", name, line: { dash }, x: part.map((l) => l.eps_255), y: part.map((l) => l.right),
      });
      data = [trace(bare, "no defence", "dot"), trace(rows, select.defence.value, "solid")];
      title = "worst case against the budget (of 255)";
    }
    const colour = dark() ? "#ddd" : "#222";
    const layout = {
      title: { text: title, font: { size: 14 } }, margin: { t: 40, l: view === "map" ? 120 : 50, r: 10, b: 90 },
      yaxis: view === "map" ? {} : { range: [0, 105], title: { text: "right decisions, %" } },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour }, height: 460,
    };
    Plotly.react("chart", data, layout, { responsive: true, displayModeBar: false });
    const cells = (tag, values) => `<tr>${values.map((value) => `<${tag}>${value}</${tag}>`).join("")}</tr>`;
    const head = cells("th", ["defence", "attack", "way", "budget", "right, %", "95 %", "pairs"]);
    const body = rows.map((l) => cells("td", [l.defence, l.attack, l.way, l.eps_255, l.right.toFixed(0), `${l.low.toFixed(0)} to ${l.high.toFixed(0)}`, l.n]));
    document.getElementById("numbers").innerHTML = `<table class="table">${head}${body.join("")}</table>`;
  }

  Object.values(select).forEach((element) => element.addEventListener("change", draw));
  new MutationObserver(draw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  draw();
})();
