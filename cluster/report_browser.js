"use strict";
// Searches and sorts the samples of the page.  What models and data sets wrote becomes text nodes, never markup.
// The controls' state is the address's fragment, so that a view can be sent to somebody: #set=1&q=dog&by=k&up=1&diff=1
(() => {
  const PAGE = 20;
  const LARGEST_DIFF = 4e6;
  const data = JSON.parse(document.getElementById("sample-data").textContent);
  const control = (name) => document.getElementById(`sample-${name}`);
  const [set, query, by, up, diff, count, list, more] =
    ["set", "query", "by", "up", "diff", "count", "list", "more"].map(control);
  let shown = PAGE;

  function element(name, className, ...children) {
    const made = document.createElement(name);
    made.className = className;
    made.append(...children);
    return made;
  }

  function option(value, label) {
    const made = document.createElement("option");
    made.value = value;
    made.textContent = label;
    return made;
  }

  // Words, each with the spaces before it; single characters where there are hardly any words in either text.
  function pieces(...texts) {
    const words = texts.map((text) => text.match(/\s*\S+|\s+$/g) || []);
    return words.every((found) => found.length < 4) ? texts.map((text) => Array.from(text)) : words;
  }

  // The longest common subsequence, as runs of ["same" | "del" | "ins", text].
  function difference(before, after) {
    const [a, b] = pieces(before, after);
    const width = b.length + 1;
    if (a.length * b.length > LARGEST_DIFF) return [["del", before], ["ins", after]];
    const alike = (i, j) => a[i] === b[j] || (a[i].trim() !== "" && a[i].trim() === b[j].trim());
    const lengths = new Uint32Array((a.length + 1) * width);
    for (let i = a.length - 1; i >= 0; i--) {
      for (let j = b.length - 1; j >= 0; j--) {
        lengths[i * width + j] = alike(i, j)
          ? lengths[(i + 1) * width + j + 1] + 1
          : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
      }
    }
    const runs = [];
    const add = (kind, text) => {
      if (runs.length && runs[runs.length - 1][0] === kind) runs[runs.length - 1][1] += text;
      else runs.push([kind, text]);
    };
    let i = 0, j = 0;
    while (i < a.length || j < b.length) {
      if (i < a.length && j < b.length && alike(i, j)) { add("same", b[j]); i++; j++; }
      else if (j === b.length || (i < a.length && lengths[(i + 1) * width + j] >= lengths[i * width + j + 1])) {
        add("del", a[i]); i++;
      } else { add("ins", b[j]); j++; }
    }
    return runs;
  }

  function answer(sample) {
    const quote = document.createElement("blockquote");
    if (diff.checked && sample.b !== undefined) {
      for (const [kind, text] of difference(sample.b, sample.r)) {
        quote.append(kind === "same" ? text : element(kind, "", text));
      }
    } else quote.append(sample.r || "(empty)");
    return quote;
  }

  function card(sample) {
    const facts = Object.entries(sample.c).map(([name, value]) => `${name} ${value.toFixed(2)}`);
    if (sample.k !== undefined) facts.push(`log-ratio ${sample.k.toFixed(2)}`);
    facts.push(`${sample.n} tokens`);
    const chips = element("div", "chips", ...facts.map((fact) => element("span", "", fact)));
    if (sample.f === "length") chips.append(element("span", "cut", "cut off"));
    const prompt = element("p", "prompt", data.prompts[sample.p]);
    return element("article", "card", prompt, element("div", "answer", answer(sample), chips));
  }

  function value(sample) {
    if (by.value.startsWith("c:")) return sample.c[by.value.slice(2)];
    return sample[by.value];
  }

  function chosen() {
    const wanted = query.value.toLowerCase();
    const samples = data.sets[set.value].samples.filter((sample) =>
      !wanted || sample.r.toLowerCase().includes(wanted) || data.prompts[sample.p].toLowerCase().includes(wanted));
    if (by.value === "order") return up.checked ? samples.reverse() : samples;
    const sign = up.checked ? 1 : -1;
    const rank = (sample) => value(sample) ?? sign * Infinity;  // who has no value comes last
    return samples.sort((first, second) => {
      const a = rank(first), b = rank(second);
      return a === b ? 0 : sign * (a < b ? -1 : 1);
    });
  }

  function draw() {
    const samples = chosen();
    list.replaceChildren(...samples.slice(0, shown).map(card));
    count.textContent = `${samples.length} of ${data.sets[set.value].samples.length} samples`;
    more.hidden = samples.length <= shown;
    const state = new URLSearchParams({ set: set.value, q: query.value, by: by.value });
    if (up.checked) state.set("up", "1");
    if (diff.checked) state.set("diff", "1");
    history.replaceState(null, "", `#${state}`);
  }

  function start() {
    data.sets.forEach((one, number) => set.append(option(number, one.name)));
    const judges = new Set(data.sets.flatMap((one) => one.samples.flatMap((sample) => Object.keys(sample.c))));
    by.append(option("order", "order"), option("w", "weighted score"));
    by.append(...[...judges].map((name) => option(`c:${name}`, name)));
    by.append(option("k", "log-ratio to the reference"), option("n", "length"));
    const state = new URLSearchParams(location.hash.slice(1));
    const last = data.sets.findLastIndex((one) => one.name.startsWith("held-out"));
    set.value = state.get("set") ?? Math.max(0, last);
    by.value = state.get("by") ?? "order";
    if (set.selectedIndex < 0) set.selectedIndex = 0;
    if (by.selectedIndex < 0) by.selectedIndex = 0;
    query.value = state.get("q") ?? "";
    up.checked = state.has("up");
    diff.checked = state.has("diff");
    for (const changed of [set, query, by, up, diff]) {
      changed.addEventListener("input", () => { shown = PAGE; draw(); });
    }
    more.addEventListener("click", () => { shown += PAGE; draw(); });
    draw();
    document.getElementById("samples").hidden = false;
  }

  start();
})();
