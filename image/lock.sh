#!/bin/sh
# Writes package-lock.json anew from package.json. Optional dependencies go: they are native
# accelerators for many platforms, which the image does not use and not every registry carries.
set -eu
cd "$(dirname "$0")"
rm -f package-lock.json
npm install --package-lock-only --ignore-scripts --omit=optional
node -e '
const fs = require("fs"), lock = JSON.parse(fs.readFileSync("package-lock.json"));
const drop = new Set();
for (const [name, p] of Object.entries(lock.packages)) {
	delete p.optionalDependencies;
	if (p.optional) drop.add(name);
	delete p.resolved; // no registry in the lock
}
for (const name of drop) delete lock.packages[name];
fs.writeFileSync("package-lock.json", JSON.stringify(lock, null, 2) + "\n");'
