"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const panel = document.getElementById("panel");
  const map = document.getElementById("lines");
  const lines = [...document.querySelectorAll("g.group")];
  const rows = [...document.querySelectorAll("tr[data-row]")];
  const make = (tag, text, name) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (name) node.className = name;
    return node;
  };
  const list = (title, items) => {
    if (!items.length) return;
    panel.append(make("div", title, "sub"));
    const ul = make("ul", undefined, "mono");
    items.forEach((item) => ul.append(make("li", item)));
    panel.append(ul);
  };
  const paste = (title, text) => {
    if (!text) return;
    panel.append(make("div", title, "sub"), make("pre", text));
  };
  const mark = (groups, names) => {
    map.classList.toggle("chosen", groups.length > 0);
    lines.forEach((line) => line.classList.toggle("on", groups.includes(Number(line.dataset.group))));
    rows.forEach((row) => row.classList.toggle("on", names.has(data.rows[Number(row.dataset.row)].name)));
  };
  const head = (text, hue) => {
    panel.replaceChildren();
    const title = make("h3");
    if (hue !== undefined) {
      const swatch = make("span", undefined, "swatch");
      swatch.style.setProperty("--hue", hue);
      title.append(swatch);
    }
    title.append(text);
    panel.append(title);
  };
  const showGroup = (index) => {
    const group = data.groups[index];
    head(group.name, group.hue);
    panel.append(make("p", `${group.kept} of ${group.total} units stay; role ${group.role}`));
    panel.append(make("p", "These channels live or die together.", "soft"));
    list("made by", group.makes);
    list("read by", group.reads);
    paste("keep every unit", group.ignore);
    paste("another share of the units", group.share);
    mark([index], new Set(group.rows));
  };
  const showRow = (index) => {
    const row = data.rows[index];
    head(row.name);
    row.facts.forEach((fact) => panel.append(make("p", fact)));
    if (row.groups.length) {
      panel.append(make("div", "groups", "sub"));
      const ul = make("ul");
      row.groups.forEach((g) => {
        const item = make("li");
        const button = make("button", `${data.groups[g].name} (${data.groups[g].role})`, "name mono");
        button.addEventListener("click", () => showGroup(g));
        item.append(button);
        ul.append(item);
      });
      panel.append(ul);
    }
    list("stays whole", row.frozen);
    paste("keep its width, in floats", row.ignore);
    paste("bits of its own", row.bits);
    mark(row.groups, new Set([row.name]));
  };
  lines.forEach((line) => line.addEventListener("click", () => showGroup(Number(line.dataset.group))));
  rows.forEach((row) => row.addEventListener("click", () => showRow(Number(row.dataset.row))));
})();
