'use strict';
const records = JSON.parse(document.getElementById('records').textContent);

const element = (name, textContent) => Object.assign(document.createElement(name), {textContent});
const collator = new Intl.Collator('en', {numeric: true});
const compare = (a, b) =>
  typeof a === 'number' && typeof b === 'number' ? a - b : collator.compare(a, b);

for (const box of document.querySelectorAll('section[data-name]')) {
  const body = box.querySelector('tbody'), input = box.querySelector('input');
  const out = box.querySelector('output'), rows = [...body.rows];
  const picks = [...box.querySelectorAll('select')], heads = [...box.querySelectorAll('th')];
  const words = new Map(rows.map(row => [row, row.textContent.toLowerCase()]));
  const filter = () => {
    const terms = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows)
      row.hidden = !(terms.every(term => words.get(row).includes(term)) && picks.every(pick =>
        !pick.value || row.cells[pick.dataset.column].textContent === pick.value));
    out.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} rows`;
  };
  for (const control of [input, ...picks]) control.addEventListener('input', filter);
  const sort = (head, column) => {
    const sign = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
    for (const other of heads) other.setAttribute('aria-sort', 'none');
    head.setAttribute('aria-sort', sign < 0 ? 'descending' : 'ascending');
    const keys = new Map(rows.map(row => {
      const cell = row.cells[column], key = cell.dataset.key;
      return [row, key === undefined ? cell.textContent : Number(key)];
    }));
    const empty = row => keys.get(row) === '';
    rows.sort((a, b) => empty(a) - empty(b) || sign * compare(keys.get(a), keys.get(b)));
    body.append(...rows);
  };
  heads.forEach((head, column) => {
    const button = Object.assign(element('button', head.textContent), {type: 'button'});
    button.addEventListener('click', () => sort(head, column));
    head.setAttribute('aria-sort', 'none');
    head.replaceChildren(button);
  });
}

const openDialog = (title, ...nodes) => {
  document.getElementById('details-h').textContent = title;
  document.getElementById('details-body').replaceChildren(...nodes);
  document.getElementById('details').showModal();
};
const openRun = ({path, config, record}) => {
  const {seed, versions, device, command, started, seconds, epochs, steps} = record;
  const commit = record.commit && record.commit + (record.dirty ? ' (uncommitted changes)' : '');
  const packages = Object.entries(versions).map(pair => pair.join(' ')).join(', ');
  const details = {seed, commit, versions: packages, device, command, started,
    'time [s]': seconds, epochs, steps, record: path};
  const facts = document.createElement('dl');
  for (const [name, value] of Object.entries(details))
    facts.append(element('dt', name), element('dd', value ?? 'not recorded'));
  openDialog(`Run ${record.id}`, facts,
    element('h3', 'Configuration'), element('pre', JSON.stringify(config, null, 2)),
    element('h3', 'Rest of the record'), element('pre', JSON.stringify(record, null, 2)));
};
document.addEventListener('click', event => {
  const button = event.target.closest('button.run'), frame = event.target.closest('a.frame');
  if (button) openRun(records[button.dataset.run]);
  if (frame) {
    event.preventDefault();
    const title = frame.parentElement.querySelector('strong').textContent;
    openDialog(title, frame.firstChild.cloneNode());
  }
});
