"""Style and script of the page, as text: they travel inside index.html."""

STYLE = """
:root { --bg: #ffffff; --ink: #1b1b1b; --soft: #5a5a5a; --line: #d5d5d5; --band: #f4f5f7; --link: #00548a; --focus:
  #b34700; color-scheme: light; }
@media (prefers-color-scheme: dark) { :root:not([data-theme=light]) { --bg: #15171a; --ink: #e6e6e6; --soft:
  #a8adb3; --line: #3a3f45;
  --band: #1f2327; --link: #7cc4f5; --focus: #ffb066; color-scheme: dark; } }
:root[data-theme=dark] { --bg: #15171a; --ink: #e6e6e6; --soft: #a8adb3; --line: #3a3f45; --band: #1f2327; --link:
  #7cc4f5; --focus: #ffb066;
  color-scheme: dark; }
* { box-sizing: border-box; }
html { scroll-padding-top: 6rem; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
header, main { max-width: 78rem; margin: 0 auto; padding: 0 1.25rem; }
header { display: flex; gap: 1rem; align-items: center; justify-content: space-between; padding-top: 1rem; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
nav { position: sticky; top: 0; z-index: 2; background: var(--bg); border-bottom: 1px solid var(--line); }
nav ul { max-width: 78rem; margin: 0 auto; padding: .5rem 1.25rem; display: flex; flex-wrap: wrap; gap: .2rem
  1.1rem; list-style: none; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
.skip { position: absolute; left: -100rem; }
.skip:focus { left: .5rem; top: .5rem; background: var(--bg); padding: .4rem .8rem; z-index: 3; }
button, input, select { font: inherit; color: inherit; background: var(--band); border: 1px solid var(--line);
  border-radius: .3rem; padding: .2rem .5rem; }
button { cursor: pointer; }
.verdict { border-left: .25rem solid var(--link); background: var(--band); padding: .7rem 1rem; margin: .8rem 0; }
.verdict p { margin: .2rem 0; }
.note { color: var(--soft); }
code, pre { font: .85rem/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0 2rem; }
figcaption { color: var(--soft); max-width: 60rem; font-size: .92rem; }
.frame { background: #fff; border: 1px solid var(--line); border-radius: .3rem; padding: .5rem; max-width: 56rem; }
.frame img { width: 100%; height: auto; display: block; }
@media (prefers-color-scheme: dark) { :root:not([data-theme=light]) .frame { filter: invert(.91) hue-rotate(180deg);
  } }
:root[data-theme=dark] .frame { filter: invert(.91) hue-rotate(180deg); }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin: .4rem 0; font-size: .9rem;
  }
.controls output { color: var(--soft); }
.controls select { max-width: 22rem; }
.scroll { overflow: auto; max-height: 38rem; border: 1px solid var(--line); border-radius: .3rem; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
caption { caption-side: bottom; text-align: left; color: var(--soft); padding: .5rem; }
th, td { padding: .25rem .55rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { white-space: nowrap; }
td.long { white-space: normal; min-width: 22rem; }
.table ul { font-size: .85rem; color: var(--soft); }
td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
thead th { position: sticky; top: 0; background: var(--band); }
th button { border: 0; background: none; padding: 0; font-weight: 600; white-space: nowrap; }
th button::after { content: " \\2195"; color: var(--soft); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tbody tr:hover { background: var(--band); }
tr[hidden] { display: none; }
dialog { width: min(60rem, 94vw); max-height: 90vh; background: var(--bg); color: var(--ink); border: 1px solid
  var(--line); border-radius: .5rem; }
dialog form { display: flex; justify-content: space-between; align-items: center; gap: 1rem; }
dialog h2 { margin: 0; overflow-wrap: anywhere; }
dialog dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; }
dialog dt { color: var(--soft); }
dialog dd { margin: 0; overflow-wrap: anywhere; }
dialog pre { background: var(--band); padding: .7rem; border-radius: .3rem; white-space: pre-wrap; }
@media print { nav, .controls, #theme { display: none; }
.scroll { max-height: none; overflow: visible; } }
"""

SCRIPT = """
'use strict';
const records = JSON.parse(document.getElementById('records').textContent);

for (const box of document.querySelectorAll('.table')) {
  const body = box.querySelector('tbody'), input = box.querySelector('input'), out = box.querySelector('output');
  const rows = [...body.rows], picks = [...box.querySelectorAll('select')], heads = [...box.querySelectorAll('th')];
  const words = new Map(rows.map(row => [row, row.textContent.toLowerCase()]));
  const textOf = new Map(rows.map(row => [row, [...row.cells].map(cell => cell.textContent)]));
  const filter = () => {
    const terms = input.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const ok = terms.every(term => words.get(row).includes(term)) &&
        picks.every(pick => !pick.value || textOf.get(row)[pick.dataset.column] === pick.value);
      row.hidden = !ok;
      shown += ok;
    }
    out.textContent = `${shown} of ${rows.length} rows`;
  };
  input.addEventListener('input', filter);
  for (const pick of picks) pick.addEventListener('change', filter);
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.key === undefined ? cell.textContent : Number(cell.dataset.key);
  };
  const compare = (a, b) => {
    // Empty cells last, numbers before words, words with their digits as numbers.
    if (typeof a === 'number' && typeof b === 'number') return a - b;
    if (typeof a !== typeof b) return typeof a === 'number' ? -1 : 1;
    return a.localeCompare(b, 'en', {numeric: true});
  };
  heads.forEach((head, column) => head.querySelector('button').addEventListener('click', () => {
    const down = head.getAttribute('aria-sort') === 'ascending';
    for (const other of heads) other.setAttribute('aria-sort', 'none');
    head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    const keys = new Map(rows.map(row => [row, keyOf(row, column)]));
    const empty = row => keys.get(row) === '';
    rows.sort((a, b) => empty(a) - empty(b) || (down ? compare(keys.get(b), keys.get(a)) : compare(keys.get(a), keys.get(b))));
    body.append(...rows);
  }));
}

const dialog = document.getElementById('run'), dialogBody = document.getElementById('run-body');
const element = (name, content) => { const made = document.createElement(name); made.textContent = content; return made; };
document.addEventListener('click', event => {
  const button = event.target.closest('button.run');
  if (!button) return;
  const {path, config, record} = records[button.dataset.run];
  document.getElementById('run-h').textContent = `Run ${record.id}`;
  const facts = document.createElement('dl');
  const commit = record.commit && record.commit + (record.dirty ? ' (uncommitted changes)' : '');
  const told = {seed: record.seed, commit, versions: record.versions, device: record.device,
    command: record.command, started: record.started, seconds: record.seconds, epochs: record.epochs, steps: record.steps,
    record: path};
  const words = value => value && typeof value === 'object' ? Object.entries(value).map(e => e.join(' ')).join(', ') : value;
  for (const [name, value] of Object.entries(told))
    facts.append(element('dt', name), element('dd', words(value) ?? 'not recorded'));
  dialogBody.replaceChildren(facts, element('h3', 'Configuration'), element('pre', JSON.stringify(config, null, 2)),
    element('h3', 'The rest of the record'), element('pre', JSON.stringify(record, null, 2)));
  dialog.showModal();
});

const theme = document.getElementById('theme'), themes = ['system', 'light', 'dark'];
const paint = name => {
  if (name === 'system') delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = name;
  theme.textContent = `Colours: ${name}`;
  theme.setAttribute('aria-label', theme.textContent);
};
let current = 'system';
try { current = localStorage.getItem('tq-theme') || 'system'; } catch { /* a page from disk may have no storage */ }
paint(current);
theme.addEventListener('click', () => {
  current = themes[(themes.indexOf(current) + 1) % themes.length];
  try { localStorage.setItem('tq-theme', current); } catch { /* the choice then lasts as long as the page */ }
  paint(current);
});
"""
