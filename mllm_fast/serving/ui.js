// What Gradio's page lacks: words for lost connections, the answer brought into view, arrow keys between words, and a
// store in the browser for the last question.
(() => {
  const STORE = "mllm-fast", PICTURE = "mllm-fast-picture", MOST = 4 * 1024 * 1024;
  const all = (selector) => [...document.querySelectorAll(selector)];
  const one = (selector) => document.querySelector(selector);

  // --- words for what Gradio itself reports in a note that disappears, and for a server that does not answer
  function tell(words) {
    const place = one("#problem");
    if (!place) return;
    let line = one("#problem > p");
    if (!line) line = place.appendChild(document.createElement("p"));
    if (line.textContent !== words) line.textContent = words;
    line.hidden = !words;
  }
  const COPY = "This browser does not let the page copy it: copy it from here.";
  const LOST = "The server does not answer; it may be starting anew. This page tries again every two seconds, and "
    + "brings your question back when it has found it.";
  const OUT = "You are not logged in any more: load this page again and log in. Your question comes back.";
  const heard = new WeakSet(); // Gradio's notes stay in the page for a while
  function reported() {
    for (const toast of all("[data-testid=toast-text]")) {
      const words = toast.textContent.trim();
      if (!words || heard.has(toast)) continue;
      heard.add(toast);
      tell(/connection .* lost/i.test(words) ? LOST : words);
    }
  }
  const fetched = window.fetch;
  window.fetch = async (...given) => {
    const url = String(given[0]?.url ?? given[0]);
    const ours = url.includes("/gradio_api/");
    try {
      const reply = await fetched(...given);
      if (ours && reply.status === 401) tell(OUT);
      return reply;
    } catch (error) {
      if (ours && error instanceof TypeError) tell(LOST);
      throw error;
    }
  };

  // --- the answer is brought into view when it begins, unless the user moves the page meanwhile
  let before = null; // the number of the answer that stood here when the question was asked
  let moving = false; // the page is still too short to bring the answer to its top
  const number = () => one("#answer .said")?.dataset.asked ?? "";
  function begun() {
    const answer = one("#answer");
    if (!answer) return;
    const { top } = answer.getBoundingClientRect();
    if (before !== null && number() && number() !== before) {
      before = null;
      moving = top < 0 || top > window.innerHeight / 3;
    }
    if (!moving) return;
    if (top >= 0 && top < 12) { moving = false; return; }
    const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    answer.scrollIntoView({ behavior: still ? "auto" : "smooth", block: "start" });
  }
  for (const kind of ["wheel", "touchmove", "keydown", "pointerdown"])
    window.addEventListener(kind, () => { moving = false; }, { passive: true });

  // --- roles that screen readers need, and one tab stop a group of radio buttons: arrows go between those of one name
  function named() {
    for (const id of ["tokens", "heads", "routes"]) {
      const group = one(`#${id}`);
      if (!group) continue;
      const name = group.querySelector("[data-testid=block-info]")?.textContent.trim();
      if (name && group.getAttribute("aria-label") !== name) group.setAttribute("aria-label", name);
      if (id !== "routes") group.setAttribute("role", "radiogroup");
      for (const radio of group.querySelectorAll("input[type=radio]")) if (radio.name !== id) radio.name = id;
    }
    for (const [id, role] of [["problem", "alert"], ["map-problem", "alert"], ["status", "status"], ["notice", "status"]])
      one(`#${id}`)?.setAttribute("role", role);
  }
  new MutationObserver(() => { named(); begun(); reported(); })
    .observe(document.documentElement, { childList: true, subtree: true, characterData: true, attributeFilter: ["name"] });
  window.addEventListener("keydown", named, { capture: true }); // a name that was just given back makes two groups

  // --- the last question, for a page that is loaded again: controls for this browser, the image for this tab alone
  const stored = (place, key) => { try { return place.getItem(key); } catch { return null; } };
  const store = (place, key, text) => { try { place.setItem(key, text); return true; } catch { return false; } };
  const controls = () => stored(sessionStorage, STORE) || stored(localStorage, STORE);
  const remember = (values) => [sessionStorage, localStorage].forEach((place) => store(place, STORE, JSON.stringify(values)));
  const linked = () => /[?&](question|image)=/.test(window.location.search);
  let kept = null; // the path of the image that is kept

  async function keep(picture) {
    if (!picture?.url || picture.path === kept) return;
    kept = picture.path;
    sessionStorage.removeItem(PICTURE);
    try {
      const blob = await (await fetched(picture.url)).blob();
      const url = await new Promise((resolve) => {
        const reader = new FileReader();
        reader.onload = () => resolve(reader.result);
        reader.readAsDataURL(blob);
      });
      const name = picture.orig_name || "image.png";
      if (url.length > MOST || !store(sessionStorage, PICTURE, JSON.stringify({ name, url })))
        store(sessionStorage, PICTURE, JSON.stringify({ large: true }));
    } catch { kept = null; }
  }

  window.mllm = {
    // called with the image and the values of the controls, in the order of `names`, when a question is asked
    asked(names, picture, ...values) {
      tell("");
      before = number();
      if (!picture || !String(values[0] ?? "").trim()) return [];
      remember(Object.fromEntries(names.map((name, i) => [name, values[i]])));
      keep(picture);
      const url = new URL(window.location.href), theme = url.searchParams.get("__theme");
      if (url.search) window.history.replaceState(null, "", url.pathname + (theme ? `?__theme=${theme}` : ""));
      return [];
    },
    // called when another word or method is chosen
    chosen(names, ...values) {
      const before = JSON.parse(controls() || "{}");
      names.forEach((name, i) => { before[name] = values[i]; });
      remember(before);
      return [];
    },
    // what the page begins with: the query of a link, what is stored, and what became of the image
    found() {
      const picture = JSON.parse(stored(sessionStorage, PICTURE) || "{}");
      const image = picture.url ? "kept" : picture.large ? "large" : "none";
      return JSON.stringify({ query: window.location.search, stored: controls(), image });
    },
    // gives the kept image to the page as if its user had
    async back() {
      const picture = JSON.parse(stored(sessionStorage, PICTURE) || "{}");
      const input = one("#image input[type=file]");
      if (linked() || !controls() || !picture.url || !input) return;
      const blob = await (await fetched(picture.url)).blob();
      const files = new DataTransfer();
      files.items.add(new File([blob], picture.name, { type: blob.type }));
      input.files = files.files;
      input.dispatchEvent(new Event("change", { bubbles: true }));
    },
    forget() {
      for (const place of [localStorage, sessionStorage]) for (const key of [STORE, PICTURE]) place.removeItem(key);
      window.location.assign(window.location.pathname);
    },
    async copy(query) {
      const link = window.location.origin + window.location.pathname + query;
      let copied = true;
      try { await navigator.clipboard.writeText(link); } catch { copied = false; }
      return { __type__: "update", value: link, visible: true, info: copied ? "Copied." : COPY };
    },
    stopped(running) { one("#ask")?.focus(); return running; },
    download() { if (!one("#map-problem p")) setTimeout(() => (one("#file a") || one("#file")).click(), 200); },
  };
})();
