"""How the X-ray's page looks, and the envelope that every page of spectra comes in."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping

_SMALL = 480  # pixels

STYLE = """
:root{color-scheme:light dark;--ink:#1c2128;--dim:#5d6670;--page:#fff;--line:#dde2e7;
--soft:#f5f7f9;--mark:#0a58ca}
@media(prefers-color-scheme:dark){:root{--ink:#e3e7eb;--dim:#98a2ad;--page:#15191e;
--line:#313840;--soft:#1d2228;--mark:#7db1ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:2rem 1.25rem 4rem;font:16px/1.55 system-ui,sans-serif;
color:var(--ink);background:var(--page)}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .5rem;overflow-wrap:anywhere}
h2{margin:3rem 0 .5rem;font-size:1.3rem}
h3{margin:0;font-size:1rem;overflow-wrap:anywhere}
p{max-width:46rem}.dim,figcaption,caption,footer{color:var(--dim);font-size:.875rem}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;
margin:1.25rem 0}
dl div{background:var(--soft);border-radius:.5rem;padding:.6rem .8rem;min-width:0}
dt{color:var(--dim);font-size:.8rem;overflow-wrap:anywhere}
dd{margin:0;font-size:1.35rem;font-variant-numeric:tabular-nums}
dd small{display:block;color:var(--dim);font-size:.75rem;overflow-wrap:anywhere}
figure{margin:1rem 0;min-width:0}.wide{overflow-x:auto}.fit svg{max-width:100%;height:auto}
svg a{cursor:pointer}svg a:hover rect,svg a:focus-visible rect{stroke:var(--ink);stroke-width:2}
svg a:focus{outline:none}
.duo{display:grid;grid-template-columns:minmax(0,1fr);gap:1.5rem;align-items:start}
.stage{background:var(--soft);border-radius:.6rem;padding:1rem;min-width:0}
.stage p{margin:.25rem 0}.stage svg[role=img]{width:100%;height:auto;display:block;margin:.5rem 0}
.stage dl{grid-template-columns:repeat(3,1fr);gap:.4rem 1rem;margin:.6rem 0}
.stage dl div{background:none;padding:0}.stage dd{font-size:1rem}.stage dt{font-size:.75rem}
.sheet{display:none}.spot{display:block;scroll-margin-top:1rem}
.spot:target+.sheet{display:block}.stage:has(.spot:target)>.hint{display:none}
@media(min-width:64rem){.duo{grid-template-columns:minmax(0,1fr) 25rem}
.stage{position:sticky;top:1rem;max-height:calc(100vh - 2rem);overflow-y:auto}
.spot{position:fixed;top:0}}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;padding:0;margin:.5rem 0;
font-size:.8rem;color:var(--dim)}
.plans{display:grid;grid-template-columns:repeat(auto-fit,minmax(16rem,1fr));gap:1rem;margin:1rem 0}
.plans article{border:1px solid var(--line);border-radius:.6rem;padding:1rem;min-width:0}
.plans .big{font-size:1.9rem;line-height:1.3;margin:.2rem 0 0;font-variant-numeric:tabular-nums}
.plans p{margin:.3rem 0;font-size:.875rem}
details{border-top:1px solid var(--line);padding:.6rem 0}
summary{cursor:pointer;font-weight:600}summary span{color:var(--dim);font-weight:400}
table{border-collapse:collapse;font-size:.875rem}caption{text-align:left;padding-bottom:.35rem}
th,td{padding:.3rem .75rem;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{color:var(--dim)}.num{text-align:right;font-variant-numeric:tabular-nums}
"""


def envelope(title: str, body: str, style: str = "", *, refresh: int | None = None) -> str:
    """Return a whole page around a body.

    Its style is allowed by its hash and everything else is forbidden, so that whatever a model's
    names hold, nothing runs and nothing is loaded.

    Parameters
    ----------
    title
        Plain text.
    body
        HTML.
    style
        More of it.
    refresh
        Seconds after which the browser reads the page again.
    """
    whole = STYLE + style
    digest = base64.b64encode(hashlib.sha256(whole.encode()).digest()).decode()
    again = "" if refresh is None else f'<meta http-equiv="refresh" content="{refresh}">'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; style-src 'sha256-{digest}'; img-src data:\">{again}"
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
        f"<style>{whole}</style></head><body><main><h1>{html.escape(title)}</h1>"
        f"{body}</main></body></html>"
    )


def figure_class(svg: str) -> str:
    """Of a map's figure: a small map shrinks to fit a telephone, a large one scrolls.

    >>> figure_class('<svg width="458">'), figure_class('<svg width="734">')
    ('fit', 'wide')
    """
    found = re.search(r' width="(\d+)"', svg)
    return "fit" if found is not None and int(found[1]) <= _SMALL else "wide"


def facts(values: Mapping[str, str], notes: Mapping[str, str] | None = None) -> str:
    """HTML of a few figures with their names, and notes in small type under some."""
    small = {name: f"<small>{html.escape(note)}</small>" for name, note in (notes or {}).items()}
    items = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}{small.get(name, '')}</dd></div>"
        for name, value in values.items()
    )
    return f"<dl>{items}</dl>"
