// Draws the charts of the page in its colours. Redraws them for printing and when the colour scheme changes.
// Labels the cells of every table with the headings of their columns: on a phone each row becomes a card.
(function () {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const touch = window.matchMedia("(hover: none)");
  const PAPER = 640; // px: width of a printed page

  function coloured(layout, printing) {
    const style = getComputedStyle(document.documentElement);
    const ink = printing ? "#212529" : style.getPropertyValue("--ink").trim();
    const line = printing ? "#dee2e6" : style.getPropertyValue("--line").trim();
    const axis = { gridcolor: line, linecolor: line, zerolinecolor: ink };
    return Object.assign({}, layout, {
      font: Object.assign({}, layout.font, { color: ink }),
      xaxis: Object.assign({}, layout.xaxis, axis),
      yaxis: Object.assign({}, layout.yaxis, axis),
      modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: ink },
      width: printing ? PAPER : undefined,
      autosize: !printing,
    });
  }

  function draw(printing) {
    for (const [name, chart] of Object.entries(charts)) {
      const element = document.getElementById("chart-" + name);
      const options = { responsive: !printing, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
      // in print it would appear under the pointer; a touch screen always shows it, over the legend
      if (printing || touch.matches) options.displayModeBar = false;
      Plotly.react(element, chart.data, coloured(chart.layout, printing), options);
    }
  }

  for (const table of document.querySelectorAll("table")) {
    table.classList.add("cards");
    const headings = [...table.querySelectorAll("thead th")].map((heading) => heading.textContent);
    for (const row of table.tBodies[0].rows)
      [...row.cells].forEach((cell, k) => { if (headings[k]) cell.dataset.label = headings[k]; });
  }

  draw(false);
  document.documentElement.dataset.charts = Object.keys(charts).length;
  dark.addEventListener("change", () => draw(false));
  window.addEventListener("beforeprint", () => draw(true));
  window.addEventListener("afterprint", () => draw(false));
})();
