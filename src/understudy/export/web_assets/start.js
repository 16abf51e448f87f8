// A plain script, not a module: browsers refuse modules of a page opened from a file, and this is
// what tells the reader so.
'use strict';

function failStart(text, command) {
  document.documentElement.dataset.state = 'failed';
  for (const id of ['drop', 'status']) document.getElementById(id).hidden = true;
  const place = document.getElementById('error');
  place.textContent = text;
  if (command) {
    const code = document.createElement('code');
    code.textContent = command;
    place.append(code);
  }
  place.hidden = false;
}

if (location.protocol === 'file:') {
  failStart(
    'This page was opened as a file, and browsers do not let such a page read its network. Serve '
      + 'its folder instead: open a terminal there, run the line below, then open '
      + 'http://localhost:8000 in this browser.',
    'python -m http.server --bind 127.0.0.1',
  );
} else {
  import('./app.js').catch((error) => {
    failStart(`A part of this page cannot be loaded (${error.message}). Copy the whole folder again.`);
  });
}
