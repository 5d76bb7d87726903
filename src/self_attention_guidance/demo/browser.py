"""The style and the scripts that the visitor's browser gets with the page."""

AT_FIRST = """() => {
  // gradio puts a picture into a button that has no name for screen readers.
  new MutationObserver(() => {
    for (const frame of document.querySelectorAll("button:not([aria-label]) > .image-frame")) {
      const label = frame.closest(".block").querySelector("label").textContent.trim();
      frame.parentElement.setAttribute("aria-label", label);
    }
  }).observe(document.body, {childList: true, subtree: true});
  // Not gradio's event, which also fires before the address is read.
  document.addEventListener("click", (event) => {
    const tab = event.target.closest("[role=tab]");
    if (!tab) return;
    const address = new URL(window.location);
    address.searchParams.set("tab", tab.id.replace("-button", ""));
    window.history.replaceState(null, "", address);
  });
}"""
# Clicks the button once it exists and is enabled.
DRAW_AT_ONCE = """() => {
  const name = new URL(window.location).searchParams.get("draw");
  if (!%s.includes(name)) return;
  const waiting = setInterval(() => {
    const start = document.getElementById(`draw-${name}`);
    if (!start || start.disabled) return;
    clearInterval(waiting);
    start.click();
  }, 20);
}"""
_TILE = 170  # smallest width of a column, in pixels, at which captions can be read
STYLE = """
footer {display: none !important}
.gradio-container {max-width: 1200px !important; margin: 0 auto !important}
/* for screen readers only */
.picture label {clip-path: inset(50%)}
/* a grid with many columns scrolls, and does not widen the page */
.grid .image-frame {display: block !important; overflow-x: auto; contain: inline-size}
.grid button:has(.image-frame), .grid .image-frame {width: 100%}
/* only as high as its pictures */
.grid-wrap {min-height: 0 !important}
/* the contrast that WCAG requires */
.min_value, .max_value {color: var(--body-text-color) !important}
.or {color: inherit !important}
.info-text {color: var(--block-title-text-color) !important}
button[role=tab].selected {color: #b93c05 !important}
.dark button[role=tab].selected {color: #fb923c !important}
@media (max-width: 640px) {
  .gradio-container {padding: 8px !important}
  /* the button that draws is on the first screen, the other controls below the picture */
  .drawings {order: -1}
  /* six earlier pictures side by side are wider than a phone */
  .grid-container {grid-template-columns: repeat(3, minmax(0, 1fr)) !important}
}
""" + "".join(f".columns-{n} img {{min-width: {130 + n * _TILE}px}}\n" for n in range(3, 25))
