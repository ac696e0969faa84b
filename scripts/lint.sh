#!/usr/bin/env bash
# Checks that need no machine of their own: formatting, vet, staticcheck, proto
# files, and that generated code is what the proto files say.
set -euo pipefail
cd "$(dirname "$0")/.."
tool() { go tool -modfile=tools/go.mod "$@"; }
say() { printf '\033[1m==>\033[0m %s\n' "$*"; }

mapfile -t sources < <(git ls-files -co --exclude-standard '*.go' | grep -v -E '\.pb(\.gw)?\.go$')

say "gofumpt"
unformatted=$(tool gofumpt -l "${sources[@]}")
[ -z "$unformatted" ] || { printf "not formatted (run: go tool -modfile=tools/go.mod gofumpt -w FILE):\n%s\n" "$unformatted" >&2; exit 1; }

say "go vet"
go vet ./...
go vet -tags e2e ./...

say "staticcheck"
tool staticcheck -tags e2e ./...

say "buf lint"
tool buf lint

say "buf breaking (against proto/released.binpb)"
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
tool buf build -o "$copy/now.binpb"
tool buf breaking "$copy/now.binpb" --against proto/released.binpb --path cloudcode

say "generated code"
# A copy of the module without what is generated; generate there, and compare.
cp -r go.mod go.sum buf.yaml buf.gen.yaml tools proto "$copy"
find "$copy/proto" \( -name '*.pb*.go' -o -name '*.swagger.json' \) -delete
(cd "$copy" && tool buf generate)
stale=$(diff -rq "$copy/proto" proto || true)
[ -z "$stale" ] || { printf "stale (run 'make generate' and commit):\n%s\n" "$stale" >&2; exit 1; }
