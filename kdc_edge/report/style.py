"""The style sheet of the HTML reports: one constant, put into the page by html.py.

Light and dark follow the reader's system; tables scroll in their own boxes; charts use larger letters where
they are drawn small. Text on its ground has a contrast of 4.5 or more in both schemes.
"""

CSS = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --card: #f7f8f9; --text: #1a1d21; --quiet: #5a626b; --line: #e1e5e9; --axis: #9aa3ad;
  --accent: #0067a5; --heat: #56a5dd;
  --c0: #0072b2; --c1: #d55e00; --c2: #008a67; --c3: #b45f92; --c4: #b57a00; --c5: #3d9fd6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #13161a; --card: #1b1f24; --text: #e6e9ec; --quiet: #9ba5af; --line: #2c323a; --axis: #66707b;
    --accent: #6cb8ea; --heat: #2b7fb8;
    --c0: #56a9e0; --c1: #f0803c; --c2: #2cc295; --c3: #dd92bf; --c4: #e9b23f; --c5: #9ad4f5;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; scroll-padding-top: 1.5rem; }
body {
  margin: 0; background: var(--ground); color: var(--text);
  font: 1.0625rem/1.65 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-font-smoothing: antialiased; text-rendering: optimizeLegibility;
}
header, main, footer { max-width: 74rem; margin: 0 auto; padding: 0 clamp(1.1rem, 5vw, 3rem); }
header { padding-top: clamp(2.5rem, 8vw, 5.5rem); }
h1 { font-size: clamp(1.9rem, 5.5vw, 2.9rem); line-height: 1.12; letter-spacing: -.025em; font-weight: 650;
  margin: 0 0 1rem; max-width: 24ch; text-wrap: balance; }
h2 { font-size: clamp(1.35rem, 3.5vw, 1.65rem); line-height: 1.25; letter-spacing: -.015em; font-weight: 640;
  margin: 0 0 1.1rem; text-wrap: balance; }
p, ul.list { max-width: 66ch; margin: 0 0 1.1rem; text-wrap: pretty; overflow-wrap: break-word; }
ul.list { padding-left: 1.1em; }
ul.list li { margin: .3em 0; }
ul.list li::marker { color: var(--axis); }
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: .18em; }
.lead { font-size: clamp(1.1rem, 2.6vw, 1.28rem); line-height: 1.55; color: var(--quiet); max-width: 58ch; }
.small, ul.small { font-size: .875rem; line-height: 1.55; color: var(--quiet); max-width: 86ch; }
p.small { margin-bottom: .4rem; }
nav ol { list-style: none; display: flex; flex-wrap: wrap; gap: .35rem 1.5rem; padding: 0; margin: 1.8rem 0 0;
  font-size: .95rem; }
nav a { text-decoration: none; }
nav a:hover, nav a:focus-visible { text-decoration: underline; }
section { padding-top: clamp(2.2rem, 5vw, 3.2rem); margin-top: clamp(2.2rem, 5vw, 3.2rem);
  border-top: 1px solid var(--line); }
footer { margin-top: 4rem; padding-bottom: 3.5rem; }
footer p { border-top: 1px solid var(--line); padding-top: 1.2rem; max-width: none; }

section > :last-child { margin-bottom: 0; }
figure { margin: 0 0 1.8rem; min-width: 0; }
figcaption, caption { text-align: left; font-size: 1rem; font-weight: 600; line-height: 1.4; padding: 0;
  margin: 0 0 .7rem; }
.chart { container-type: inline-size; max-width: 44rem; }
.plot { display: block; width: 100%; height: auto; overflow: visible; }
.plot text { font-size: 12.5px; fill: var(--quiet); font-variant-numeric: tabular-nums; }
.plot .end { text-anchor: end; }
.plot .mid { text-anchor: middle; }
.plot .name, .plot .value { fill: var(--text); font-size: 13.5px; }
.plot .value { font-weight: 600; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--axis); stroke-width: 1; }
.bar { fill: var(--c0); }
.line { fill: none; stroke-width: 2.25; stroke-linejoin: round; stroke-linecap: round; }
.dot { stroke: var(--ground); stroke-width: 1.5; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
.line.c1 { stroke-dasharray: 7 4.5; } .line.c2 { stroke-dasharray: 1.5 4.5; }
.line.c3 { stroke-dasharray: 11 4 2 4; }
.line.c4 { stroke-dasharray: 4 4; } .line.c5 { stroke-dasharray: 14 5; }
.dot.c0 { fill: var(--c0); } .dot.c1 { fill: var(--c1); } .dot.c2 { fill: var(--c2); }
.dot.c3 { fill: var(--c3); } .dot.c4 { fill: var(--c4); } .dot.c5 { fill: var(--c5); }
.dot { stroke: var(--ground); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.3rem; padding: 0; margin: 0 0 .8rem;
  font-size: .9rem; color: var(--quiet); }
.legend li { display: flex; align-items: center; gap: .5rem; }
.key { width: 26px; height: 8px; flex: none; }
.part-key, .dot-key { width: 12px; height: 12px; }
.part { stroke: var(--ground); stroke-width: 1; }
.f0 { fill: var(--c0); } .f1 { fill: var(--c1); } .f2 { fill: var(--c2); }
.f3 { fill: var(--c3); } .f4 { fill: var(--c4); } .f5 { fill: var(--c5); }
.ring { fill: none; stroke: var(--text); stroke-width: 1.75; }
.limit { stroke: var(--axis); stroke-width: 1.25; stroke-dasharray: 6 4; }
.leader { stroke: var(--quiet); stroke-width: 1; }
.plot .point { fill: var(--text); paint-order: stroke; stroke: var(--ground); stroke-width: 3px; }
.plot .strong { font-weight: 650; }
.plot .narrow { display: none; }
@container (max-width: 560px) {
  .plot text { font-size: 15px; }
  .plot .name, .plot .value { font-size: 16px; }
}
@container (max-width: 400px) {
  .plot .wide { display: none; } .plot .narrow { display: inline; }
  .plot text { font-size: 19.5px; }
  .plot .name, .plot .value { font-size: 22px; }
}
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr));
  gap: 2.2rem 3.5rem; margin: 0 0 2rem; }
.side > * { min-width: 0; }
.side > div > :last-child { margin-bottom: 0; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(42%, 11rem), 1fr));
  gap: 1.4rem 2rem; margin: 1.8rem 0 2rem; }
.tiles div { border-left: 3px solid var(--accent); padding: .1rem 0 .1rem .95rem; display: flex;
  flex-direction: column-reverse; justify-content: flex-end; }
.tiles dd { margin: 0; font-size: clamp(1.5rem, 4vw, 2rem); font-weight: 640; letter-spacing: -.02em;
  line-height: 1.2; font-variant-numeric: tabular-nums; }
.tiles dt { color: var(--quiet); font-size: .875rem; line-height: 1.4; }

.box { overflow-x: auto; margin: 0 0 1.8rem; max-width: 100%; -webkit-overflow-scrolling: touch; }
.box:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
.data { min-width: min(100%, 36rem); }
.data th, .data td { padding: .6rem .55rem; text-align: left; vertical-align: baseline;
  border-bottom: 1px solid var(--line); }
.data thead th { color: var(--quiet); font-weight: 550; font-size: .82rem; vertical-align: bottom;
  line-height: 1.3; border-bottom-color: var(--axis); }
.data :is(th, td):first-child { padding-left: 0; position: sticky; left: 0; background: var(--ground); }
.data :is(th, td):last-child { padding-right: 0; }
.data tbody th { font-weight: 600; white-space: nowrap; }
.data .right { text-align: right; }
.data td.right { white-space: nowrap; }

.heat { border-collapse: separate; border-spacing: 3px; margin-left: -3px; }
.heat caption { padding-left: 3px; }
.heat th { font-weight: 500; color: var(--quiet); padding: .35rem .7rem .35rem 3px; text-align: left; }
.heat thead th { text-align: center; padding: .35rem .6rem; }
.heat td { min-width: 5.2rem; padding: .8rem .6rem; text-align: center; border-radius: 5px; font-weight: 600;
  background: color-mix(in srgb, var(--heat) calc(var(--share) * 1%), var(--card)); }
.heat .none { color: var(--quiet); font-weight: 400; }

.images { border-collapse: separate; border-spacing: 0; --side: clamp(96px, 10.5vw, 148px); }
.images th { font-weight: 500; text-align: left; padding: 0 .9rem .5rem 0; }
.images thead th { color: var(--quiet); font-size: .82rem; line-height: 1.35; vertical-align: bottom;
  width: calc(var(--side) + .6rem); padding: 0 .6rem .5rem 0; overflow-wrap: anywhere; }
.images tbody th { font-size: .9rem; vertical-align: middle; width: 8rem;
  min-width: 5.2rem; position: sticky; left: 0; background: var(--ground); line-height: 1.3; overflow-wrap: anywhere; }
.images td { padding: 0 .6rem .6rem 0; }
.images img { display: block; width: var(--side); height: auto; border-radius: 6px;
  background: var(--card); }
.images img.small-image { image-rendering: pixelated; }
.images .missing { width: var(--side); aspect-ratio: 1; display: grid; place-items: center;
  border: 1px dashed var(--axis); border-radius: 6px; color: var(--quiet); font-size: .8rem; }
.cards { list-style: none; padding: 0; margin: 0 0 1.8rem; display: grid; gap: 1.6rem 1.8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.cards figure { margin: 0; }
.cards figcaption { font-size: .95rem; margin: .5rem 0 0; overflow-wrap: anywhere; }
.cards figcaption .small { display: block; font-weight: 400; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; }
.pair img { display: block; width: 100%; height: auto; border-radius: 6px; background: var(--card); }
.pair img.small-image { image-rendering: pixelated; }
.option { display: inline-block; max-width: 100%; }
pre { font: .9rem/1.5 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; margin: 0 0 1.4rem;
  padding: .8rem 1rem; background: var(--card); border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere;
  max-width: 86ch; }
@media (max-width: 480px) {
  .images tbody th { width: auto; font-size: .8rem; padding-right: .5rem; }
  .data tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 6.6rem; }
}
@media print { section { break-inside: avoid; } .box { overflow: visible; } nav { display: none; } }
"""
