// Package image says what is inside a session's container and builds it: an OCI archive with
// Debian, Node.js, OpenCode and a preset, made without Docker and without a registry.
//
// The image has up to four layers, each cached by what goes into it: the distribution
// (mmdebstrap), the pinned npm packages (Node.js, npm, OpenCode), cloudflared if there is one, and
// our own small files (preset, entrypoint). Two builds against the same mirror state give one digest.
package image

import (
	"embed"
	"encoding/json"
	"fmt"
	"io/fs"
	"strconv"

	"github.com/cloudcode-dev/cloudcode/internal/container"
)

// Versions of what is pinned. They repeat package.json so that DefaultRef can be a constant;
// a test keeps the two and the Dockerfile equal.
const (
	OpenCodeVersion = "1.18.34"
	NodeVersion     = "22.23.3"
	NPMVersion      = "10.9.9"
	PluginVersion   = "1.18.33" // @opencode-ai/plugin; npm has it under other versions than OpenCode
	Suite           = "trixie"  // Debian 13, which has Python 3.13
)

// DefaultRef is the name that an archive gives its image when it is imported.
const DefaultRef = "localhost/cloudcode/session:" + OpenCodeVersion

// OpenCodePort is where OpenCode listens inside a container unless PORT says otherwise.
const OpenCodePort = container.OpenCodePort

// OpenCodeUser is the user name that OpenCode's own server password goes with.
const OpenCodeUser = container.OpenCodeUser

// Paths inside a container. Only what is below Root outlives it.
const (
	Root       = container.StorageDir
	Workspace  = container.WorkspaceDir
	ProjectDir = container.ProjectDir // OpenCode's working directory
	ConfigHome = Root + "/.opencode/config"
	DataHome   = Root + "/.opencode/data"
	StateHome  = Root + "/.opencode/state"
	PresetDir  = "/usr/share/cloudcode/preset"
	Entrypoint = "/usr/local/bin/cloudcode-entrypoint"

	// OpenCode's plugin library, and the lock file that tells OpenCode that a folder has it.
	PluginModules = "/usr/local/lib/cloudcode/opencode/node_modules"
	PluginLock    = "/usr/share/cloudcode/opencode-plugin-lock.json"
)

// Packages is what the image takes from Debian besides its minimal base. OpenCode's tools need
// git, ripgrep and a shell; the rest is what an agent reaches for and can hardly work without.
var Packages = []string{
	"bash", "bzip2", "ca-certificates", "curl", "file", "git", "iproute2", "jq", "less", "make",
	"openssh-client", "patch", "procps", "python-is-python3", "python3", "python3-pip",
	"python3-venv", "ripgrep", "tini", "tzdata", "unzip", "xz-utils", "zip",
}

// Env is the environment that the image gives every process in a container; a session's own
// environment goes over it.
//
// OPENCODE_DISABLE_MODELS_FETCH: OpenCode carries a list of models from its release day and
// otherwise fetches a newer one at each start, which costs 0.6 s and hangs around without internet.
// Providers in a user's configuration work either way; "0" turns the fetch on for models that are
// newer than the image. NODE_ENV stays unset: with "production" npm would skip the development
// dependencies of the projects that agents work on.
func Env() []string {
	return []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/root",
		"LANG=C.UTF-8",
		"SHELL=/bin/bash",
		"DEBIAN_FRONTEND=noninteractive",
		"XDG_CONFIG_HOME=" + ConfigHome,
		"XDG_DATA_HOME=" + DataHome,
		"XDG_STATE_HOME=" + StateHome,
		"OPENCODE_DISABLE_AUTOUPDATE=1",
		"OPENCODE_DISABLE_MODELS_FETCH=1",
	}
}

// Command is the image's entrypoint. tini reaps the orphans that agents' tools leave behind.
func Command() []string { return []string{"/usr/bin/tini", "--", Entrypoint} }

// labels describe the image to people; nothing of ours acts on them.
func labels() map[string]string {
	return map[string]string{
		"org.opencontainers.image.title":       "Cloud Code session",
		"org.opencontainers.image.description": "Debian, Python, Node.js and OpenCode for one agent session",
		"dev.cloudcode.opencode.version":       OpenCodeVersion,
		"dev.cloudcode.opencode.port":          strconv.Itoa(OpenCodePort),
	}
}

//go:embed package.json package-lock.json
var npmFiles embed.FS

// files is copied into the image by the table in files.go.
//
//go:embed all:files
var files embed.FS

// Preset is the workspace and OpenCode configuration that a new session starts from:
// workspace/… and config/opencode/….
func Preset() fs.FS {
	sub, err := fs.Sub(files, "files/preset")
	if err != nil {
		panic(err) // a constant, valid path
	}
	return sub
}

// lockedVersions reads what package-lock.json pins, by package name.
func lockedVersions() (map[string]string, error) {
	data, err := npmFiles.ReadFile("package-lock.json")
	if err != nil {
		return nil, err
	}
	var lock struct {
		Packages map[string]struct {
			Version      string            `json:"version"`
			Dependencies map[string]string `json:"dependencies"`
		} `json:"packages"`
	}
	if err := json.Unmarshal(data, &lock); err != nil {
		return nil, fmt.Errorf("package-lock.json: %w", err)
	}
	out := make(map[string]string)
	for name := range lock.Packages[""].Dependencies {
		out[name] = lock.Packages["node_modules/"+name].Version
	}
	return out, nil
}
