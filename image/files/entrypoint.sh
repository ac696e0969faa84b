#!/bin/sh
# Starts OpenCode on a session's workspace. Everything below $root outlives the container, so what
# is there already belongs to the user: presets only fill what is empty or missing.
set -eu

root=${CLOUDCODE_ROOT:-/root/s3}
preset=${CLOUDCODE_PRESET_DIR:-/usr/share/cloudcode/preset}
plugin=${CLOUDCODE_PLUGIN_DIR:-/usr/local/lib/cloudcode/opencode/node_modules/@opencode-ai/plugin}
plugin_lock=${preset%/*}/opencode-plugin-lock.json
workspace=$root/workspace
project=$workspace/project

# Kept if set, so that a caller can hold OpenCode's data elsewhere than the workspace.
export XDG_CONFIG_HOME="${XDG_CONFIG_HOME:-$root/.opencode/config}"
export XDG_DATA_HOME="${XDG_DATA_HOME:-$root/.opencode/data}"
export XDG_STATE_HOME="${XDG_STATE_HOME:-$root/.opencode/state}"
config=$XDG_CONFIG_HOME/opencode

log() { printf 'cloudcode-entrypoint: %s\n' "$*" >&2; }
die() {
	log "error: $*"
	exit 1
}

make_dir() {
	mkdir -p "$1" || die "cannot create $1: is the workspace's disk full, read-only or owned by somebody else?"
}

# A workspace with nothing but an empty project folder counts as empty: the container's runtime
# makes that folder when it is the working directory.
workspace_empty() {
	for entry in "$workspace"/* "$workspace"/.[!.]* "$workspace"/..?*; do
		[ -e "$entry" ] || [ -L "$entry" ] || continue
		[ "$entry" = "$project" ] && dir_empty "$project" && continue
		return 1
	done
}

dir_empty() { [ -d "$1" ] && [ ! -L "$1" ] && [ -z "$(ls -A "$1")" ]; }

make_dir "$workspace"
for dir in "$config" "$XDG_DATA_HOME" "$XDG_STATE_HOME"; do make_dir "$dir"; done
if [ -n "${OPENCODE_DB:-}" ]; then
	case $OPENCODE_DB in
	*/*) make_dir "${OPENCODE_DB%/*}" ;;
	esac
fi

if workspace_empty && [ -d "$preset/workspace" ]; then
	cp -R "$preset/workspace/." "$workspace/" || die "cannot copy the preset into $workspace"
	log "filled the empty workspace from the preset"
fi
make_dir "$project"

# Written under another name first: a container that is killed here leaves no half a file.
for file in opencode.json AGENTS.md; do
	[ -e "$config/$file" ] || [ -L "$config/$file" ] && continue
	[ "$file" = opencode.json ] && [ -e "$config/opencode.jsonc" ] && continue
	[ -f "$preset/config/opencode/$file" ] || continue
	cp "$preset/config/opencode/$file" "$config/.$file.new" && mv "$config/.$file.new" "$config/$file" ||
		die "cannot write $config/$file"
	log "wrote the preset's $file"
done

# OpenCode downloads its plugin library (63 MB, 3,600 files) into every configuration folder that
# does not have it, in the background of the first prompt. The image has it: a link and a lock file
# that names it are enough. A folder whose lock file is not ours looks after itself.
link_plugin() {
	link=$1/node_modules/@opencode-ai/plugin
	if [ -e "$1/package-lock.json" ]; then
		cmp -s "$plugin_lock" "$1/package-lock.json" || return 0
	elif [ -e "$1/node_modules" ] || [ -e "$1/package.json" ]; then
		return 0
	fi
	[ -e "$link/package.json" ] && return 0
	rm -rf "$link"
	mkdir -p "${link%/*}" && ln -s "$plugin" "$link" && cp "$plugin_lock" "$1/package-lock.json" ||
		log "warning: cannot link OpenCode's plugin library into $1; OpenCode will download it"
}
if [ -d "$plugin" ]; then
	link_plugin "$config"
	[ ! -d "$root/.opencode" ] || link_plugin "$root/.opencode"
fi

cd "$project" || die "cannot enter $project"
command -v opencode >/dev/null || die "opencode is not in PATH ($PATH)"
exec opencode serve --hostname "${OPENCODE_HOSTNAME:-127.0.0.1}" --port "${PORT:-2633}"
