"""The style sheet of the HTML page. LIGHT and DARK stand for the colours of runs and layers."""

__all__ = ["CSS"]

CSS = """\
:root { color-scheme: light dark; --ground: #ffffff; --panel: #f6f7f8; --text: #1b1f23; --soft: #59636e;
  --line: #d8dde2; --bad: #b3261e; LIGHT }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --panel: #1c2126; --text: #e8eaed; --soft: #9aa5b1;
  --line: #343b43; --bad: #ff8a80; DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 1.2rem; margin: 44px 0 8px; }
h3 { font-size: 1rem; margin: 0 0 8px; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 6px 0; max-width: 76ch; }
.soft, figcaption, footer { color: var(--soft); font-size: .9rem; }
.bad { color: var(--bad); font-weight: 600; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin: 22px 0 4px; }
.tile { background: var(--panel); border-radius: 8px; padding: 12px 16px; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 8px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
td small { display: block; color: var(--soft); }
td.reason { text-align: left; white-space: normal; overflow-wrap: anywhere; }
tr.deployed td { font-weight: 650; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); gap: 20px 28px; }
figure { margin: 0; min-width: 0; }
.plots figure b { display: block; font-size: .95rem; font-weight: 600; color: var(--text); }
svg.plot { width: 100%; height: auto; display: block; }
.image { margin: 0 0 30px; }
.trio { display: grid; grid-template-columns: repeat(3, 1fr); gap: 10px; }
.trio img { width: 100%; height: auto; display: block; border-radius: 4px; }
.key { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 10px 0 18px; font-size: .9rem; }
.key i { display: inline-block; width: 20px; height: 13px; margin-right: 7px; vertical-align: -2px; background: #4a5a48;
  border: 2px solid; outline: 1px solid #101010; }
.key i.dashed { border-style: dashed; }
code { font: .86rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { background: var(--panel); padding: 10px 14px; border-radius: 6px; white-space: pre-wrap; margin: 8px 0; }
footer { margin-top: 40px; border-top: 1px solid var(--line); padding-top: 12px; }
@media (max-width: 640px) { main { padding: 20px 14px 48px; } .trio { grid-template-columns: 1fr; } }
"""
