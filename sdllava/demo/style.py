"""The look of the page. Colours are the theme's, so that they follow the light or dark mode of the browser."""

from typing import Any

FONTS: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
CSS = """
.gradio-container { --quiet: color-mix(in srgb, var(--body-text-color) 72%, transparent); }
#introduction h1 { margin: 0 0 4px; font-size: 1.5rem; }
#introduction p { margin: 0; }
#untrained { border-left: 4px solid #d97706; padding-left: 10px; }

.pictures { margin: 0; }
.pictures .row { display: flex; gap: 8px; }
.pictures .row img {
  flex: 1 1 0; min-width: 0; width: 100%; max-height: 380px; margin: 0; object-fit: contain; border-radius: 8px;
}
.pictures figcaption { margin-top: 6px; font-size: 14px; line-height: 1.35; color: var(--body-text-color); }
.pictures details { margin-top: 4px; font-size: 12px; line-height: 1.4; color: var(--quiet); }
.pictures summary { cursor: pointer; }
.pictures .scale {
  display: flex; align-items: center; gap: 8px; margin-top: 6px; font-size: 12px;
  color: var(--quiet);
}
.pictures .bar { flex: 1; height: 10px; border: 1px solid var(--border-color-primary); border-radius: 5px; }
.pictures .warning {
  margin: 8px 0 0; padding: 6px 10px; border-left: 4px solid #d97706; font-size: 14px;
  background: var(--background-fill-secondary); color: var(--body-text-color);
}

#image-problem:not(:has(p)), #question-problem:not(:has(p)), #upload-problem:not(:has(p)) { display: none; }
#question textarea { field-sizing: content; height: auto !important; max-height: 6em; }
#ask-row { flex-wrap: nowrap; align-items: end; }
#ask { height: 44px; margin-bottom: 2px; }
.problem { margin: 4px 0 0; font-size: 14px; font-weight: 600; color: #dc2626; }
.dark .problem { color: #f87171; }
.invalid textarea, .invalid input { border-color: #dc2626 !important; outline: 1px solid #dc2626; }

.answers { display: grid; gap: 2px; margin: 0; }
.answers dt { font-size: 13px; color: var(--quiet); }
.answers dd { margin: 0 0 6px; font-size: 1.05rem; color: var(--body-text-color); overflow-wrap: anywhere; }
.answers dt:first-of-type { font-weight: 600; color: var(--body-text-color); }
.answers dd:first-of-type { font-size: 1.45rem; font-weight: 600; }
.answers .verdict { margin-left: 6px; padding: 1px 8px; border-radius: 9px; font-size: 12px; font-weight: 600; }
.answers .right { background: #166534; color: #fff; }
.answers .wrong { background: #991b1b; color: #fff; }
.truth { margin: 0; font-size: 13px; color: var(--quiet); }

#examples .caption-label { display: none; }
button:focus-visible, input:focus-visible, summary:focus-visible, [role=radio]:focus-visible {
  outline: 3px solid #2563eb; outline-offset: 2px;
}

@media (max-width: 640px) {
  .pictures .row img { max-height: 30vh; }
  #introduction h1 { font-size: 1.2rem; }
}
"""
