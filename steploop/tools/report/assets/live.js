// The page follows its runs: it asks for itself again and again, and puts in what is new. Charts, folds and the place
// that a reader has reached stay as they are.
"use strict";
{
  const OFTEN = 2000, RARELY = 15000; // ms between two questions; rarely where nobody looks
  const PATIENCE = 10; // questions for which a chart that is being read stays as it is
  const state = document.createElement("p");
  state.className = "note live";
  document.querySelector("h1").after(state);
  const say = (name, text) => { state.dataset.state = name; state.textContent = text; };
  const now = () => new Date().toLocaleTimeString();
  const nameOf = (figure) => figure.querySelector("figcaption").firstChild.textContent;
  const figuresIn = (section) => new Map([...section.querySelectorAll("figure.chart")].map((figure) => [nameOf(figure), figure]));

  let tag = null, latest = null;
  const source = new Map(); // what a part was made from: the script of the page changes the part itself
  const waited = new Map();

  const inUse = (part) => part.contains(document.activeElement) || part.matches("figure:hover") || (() => {
    const selection = getSelection();
    return !selection.isCollapsed && selection.containsNode(part, true);
  })();
  // whether a part may be replaced now; one that is being read is left alone for a while
  const free = (key, part) => {
    if (!inUse(part)) { waited.delete(key); return true; }
    const times = (waited.get(key) ?? 0) + 1;
    waited.set(key, times);
    if (times <= PATIENCE) return false;
    waited.delete(key);
    return true;
  };
  const replace = (old, next) => {
    const open = [...old.querySelectorAll("details")].map((fold) => fold.open);
    const switched = old.querySelector(".scale")?.dataset.switched;
    old.replaceWith(next);
    next.querySelectorAll("details").forEach((fold, i) => { fold.open = open[i] ?? fold.open; });
    bringToLife(next);
    if (switched) next.querySelector(".scale")?.click();
  };
  // puts one part in, if it is another one than before; false if that has to wait
  const renew = (key, old, next) => {
    const html = next.outerHTML;
    if (source.get(key) === html) return true;
    if (source.has(key) && !free(key, old)) return false;
    source.set(key, html);
    replace(old, document.importNode(next, true));
    return true;
  };
  const apply = (text) => {
    const page = new DOMParser().parseFromString(text, "text/html");
    document.title = page.title;
    let done = true;
    const sections = (root) => [...root.querySelectorAll("main > section")];
    const mine = sections(document), theirs = sections(page);
    const heading = (section) => section.querySelector("h2")?.textContent ?? "";
    if (mine.map(heading).join("\n") !== theirs.map(heading).join("\n")) { // a section more: all of it anew
      source.clear();
      mine.forEach((section) => section.remove());
      theirs.forEach((section) => {
        const copy = document.importNode(section, true);
        document.querySelector("main").append(copy);
        bringToLife(copy);
      });
      return true;
    }
    theirs.forEach((section, i) => {
      const old = figuresIn(mine[i]), next = figuresIn(section);
      if (next.size && [...old.keys()].join("\n") === [...next.keys()].join("\n")) {
        for (const [name, figure] of next) done = renew(`${i} ${name}`, old.get(name), figure) && done;
      } else {
        done = renew(`${i}`, mine[i], section) && done;
      }
    });
    return done;
  };
  const ask = async () => {
    try {
      const answer = await fetch(location.pathname, { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
      if (answer.status === 200) {
        latest = await answer.text();
        tag = answer.headers.get("ETag");
        state.title = `Changed at ${now()}`;
      } else if (answer.status !== 304) {
        throw new Error(await answer.text());
      }
      if (latest !== null && apply(latest)) latest = null;
      say("on", `Live: as of ${now()}`);
    } catch (error) {
      const why = error instanceof TypeError ? "steploop watch has ended, or the tunnel to it" : error.message;
      say("off", `Not live: ${why}. What is shown is older.`);
    }
    setTimeout(ask, document.hidden ? RARELY : OFTEN);
  };
  say("on", "Live");
  ask();
}
