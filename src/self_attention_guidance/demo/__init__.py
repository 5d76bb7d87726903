"""A web page that shows what guidance does: pictures side by side, step by step, scale by scale.

It needs the extra `demo` (gradio). `sag demo` opens it; `build_page` gives the app to mount
elsewhere.

Example:
    ```python
    from self_attention_guidance.demo import Limits, build_page
    from self_attention_guidance.generate import load_pipeline

    page = build_page(load_pipeline("emoji"), Limits(max_steps=25))
    page.app.launch(**page.launch_settings)
    ```
"""

from .limits import Limits, VisitorSettings
from .page import Page, build_page

__all__ = ["Limits", "Page", "VisitorSettings", "build_page"]
