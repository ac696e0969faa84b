package image

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// entry is a temporary root to run the entrypoint in, with a stand-in for opencode that prints what it gets.
type entry struct {
	t    *testing.T
	root string
	env  []string
}

func newEntry(t *testing.T) *entry {
	t.Helper()
	dir := t.TempDir()
	bin := filepath.Join(dir, "bin")
	mustWrite(t, filepath.Join(bin, "opencode"), "#!/bin/sh\necho \"args=$*\"\necho \"pwd=$(pwd)\"\nenv | grep ^XDG_\n", 0o755)
	if err := os.CopyFS(filepath.Join(dir, "preset"), Preset()); err != nil {
		t.Fatal(err)
	}
	script, err := files.ReadFile("files/entrypoint.sh")
	if err != nil {
		t.Fatal(err)
	}
	mustWrite(t, filepath.Join(dir, "entrypoint"), string(script), 0o755)
	mustWrite(t, filepath.Join(dir, "plugin", "package.json"), "{}", 0o644)
	mustWrite(t, filepath.Join(dir, "opencode-plugin-lock.json"), "ours", 0o644)
	return &entry{t: t, root: filepath.Join(dir, "s3"), env: []string{
		"PATH=" + bin + ":/usr/bin:/bin",
		"CLOUDCODE_ROOT=" + filepath.Join(dir, "s3"),
		"CLOUDCODE_PLUGIN_DIR=" + filepath.Join(dir, "plugin"),
		"CLOUDCODE_PRESET_DIR=" + filepath.Join(dir, "preset"),
	}}
}

func (e *entry) run(env ...string) (stdout, stderr string, err error) {
	e.t.Helper()
	cmd := exec.CommandContext(e.t.Context(), filepath.Join(filepath.Dir(e.root), "entrypoint"))
	cmd.Env = append(append([]string{}, e.env...), env...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err = cmd.Run()
	return out.String(), errOut.String(), err
}

func (e *entry) mustRun(env ...string) (stdout, stderr string) {
	e.t.Helper()
	stdout, stderr, err := e.run(env...)
	if err != nil {
		e.t.Fatalf("%v\n%s%s", err, stdout, stderr)
	}
	return stdout, stderr
}

func (e *entry) path(rel string) string { return filepath.Join(e.root, rel) }

func mustWrite(t *testing.T, path, data string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(data), mode); err != nil {
		t.Fatal(err)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, os.ErrNotExist)
}

func TestEntrypointFresh(t *testing.T) {
	e := newEntry(t)
	out, _ := e.mustRun()
	for _, want := range []string{
		"args=serve --hostname 127.0.0.1 --port 2633",
		"pwd=" + e.path("workspace/project"),
		"XDG_CONFIG_HOME=" + e.path(".opencode/config"),
		"XDG_DATA_HOME=" + e.path(".opencode/data"),
		"XDG_STATE_HOME=" + e.path(".opencode/state"),
	} {
		if !strings.Contains(out, want+"\n") {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	for _, f := range []string{"workspace/README.md", ".opencode/config/opencode/opencode.json", ".opencode/config/opencode/AGENTS.md"} {
		if readFile(t, e.path(f)) == "" {
			t.Errorf("%s is empty", f)
		}
	}
	if _, stderr := e.mustRun(); stderr != "" {
		t.Errorf("the second start did something: %s", stderr)
	}
}

func TestEntrypointListens(t *testing.T) {
	out, _ := newEntry(t).mustRun("OPENCODE_HOSTNAME=0.0.0.0", "PORT=99")
	if !strings.Contains(out, "args=serve --hostname 0.0.0.0 --port 99\n") {
		t.Error(out)
	}
}

// TestEntrypointKeepsWhatIsThere: nothing of the user's is overwritten, brought back or added to.
func TestEntrypointKeepsWhatIsThere(t *testing.T) {
	for _, tc := range []struct {
		name   string
		have   string // a file, or a folder if it ends in /
		absent string // what must not appear
	}{
		{"a file", "workspace/notes.txt", "workspace/README.md"},
		{"a hidden file", "workspace/.env", "workspace/README.md"},
		{"a project", "workspace/project/main.go", "workspace/README.md"},
		{"a hidden folder in the project", "workspace/project/.git/", "workspace/README.md"},
		{"another empty folder", "workspace/other/", "workspace/README.md"},
		{"configuration with comments", ".opencode/config/opencode/opencode.jsonc", ".opencode/config/opencode/opencode.json"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := newEntry(t)
			if dir, ok := strings.CutSuffix(tc.have, "/"); ok {
				if err := os.MkdirAll(e.path(dir), 0o755); err != nil {
					t.Fatal(err)
				}
			} else {
				mustWrite(t, e.path(tc.have), "mine", 0o644)
			}
			e.mustRun()
			if exists(e.path(tc.absent)) {
				t.Errorf("%s appeared beside %s", tc.absent, tc.have)
			}
		})
	}
	t.Run("files of the same name", func(t *testing.T) {
		e := newEntry(t)
		mine := []string{".opencode/config/opencode/opencode.json", ".opencode/config/opencode/AGENTS.md", "workspace/README.md"}
		for _, f := range mine {
			mustWrite(t, e.path(f), "mine", 0o644)
		}
		e.mustRun()
		for _, f := range mine {
			if got := readFile(t, e.path(f)); got != "mine" {
				t.Errorf("%s is now %q", f, got)
			}
		}
	})
	t.Run("an empty project folder is still an empty workspace", func(t *testing.T) {
		e := newEntry(t)
		if err := os.MkdirAll(e.path("workspace/project"), 0o755); err != nil {
			t.Fatal(err)
		}
		e.mustRun()
		if !exists(e.path("workspace/README.md")) {
			t.Error("not filled")
		}
	})
}

// TestEntrypointPlugin: the image's copy is linked where nothing is, mended where the link is lost,
// and left alone where the folder has dependencies of its own.
func TestEntrypointPlugin(t *testing.T) {
	const link = "node_modules/@opencode-ai/plugin"
	e := newEntry(t)
	e.mustRun()
	for _, dir := range []string{".opencode", ".opencode/config/opencode"} {
		if !exists(e.path(dir+"/"+link+"/package.json")) || readFile(t, e.path(dir+"/package-lock.json")) != "ours" {
			t.Errorf("%s: no plugin", dir)
		}
		// What an object store makes of a link.
		if err := os.Remove(e.path(dir + "/" + link)); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, e.path(dir+"/"+link), "not a link", 0o644)
	}
	if _, stderr := e.mustRun(); stderr != "" {
		t.Error(stderr)
	}
	if !exists(e.path(".opencode/" + link + "/package.json")) {
		t.Error("not mended")
	}
	for _, own := range []string{"package.json", "package-lock.json", "node_modules/x/package.json"} {
		e := newEntry(t)
		mustWrite(t, e.path(".opencode/"+own), "mine", 0o644)
		e.mustRun()
		if exists(e.path(".opencode/"+link)) || readFile(t, e.path(".opencode/"+own)) != "mine" {
			t.Errorf("a folder with its own %s was changed", own)
		}
	}
}

func TestEntrypointDatabaseFolder(t *testing.T) {
	e := newEntry(t)
	db := filepath.Join(t.TempDir(), "a", "b", "opencode.db")
	e.mustRun("OPENCODE_DB=" + db)
	if !exists(filepath.Dir(db)) {
		t.Error("the database's folder was not made")
	}
	e.mustRun("OPENCODE_DB=:memory:")
}

func TestEntrypointCallersFolders(t *testing.T) {
	e := newEntry(t)
	data := filepath.Join(t.TempDir(), "data")
	out, _ := e.mustRun("XDG_DATA_HOME=" + data)
	if !strings.Contains(out, "XDG_DATA_HOME="+data+"\n") || !exists(data) {
		t.Errorf("XDG_DATA_HOME was not kept: %s", out)
	}
}

func TestEntrypointErrors(t *testing.T) {
	t.Run("workspace cannot be made", func(t *testing.T) {
		e := newEntry(t)
		mustWrite(t, e.root, "a file", 0o644)
		_, stderr, err := e.run()
		if err == nil || !strings.Contains(stderr, "cloudcode-entrypoint: error: cannot create "+e.path("workspace")) {
			t.Errorf("%v: %s", err, stderr)
		}
	})
	t.Run("no opencode", func(t *testing.T) {
		e := newEntry(t)
		// The machine that tests may have one: a PATH of just what the script runs.
		bin := t.TempDir()
		for _, name := range []string{"sh", "mkdir", "ls", "cp", "mv", "rm", "ln", "cmp"} {
			p, err := exec.LookPath(name)
			if err == nil {
				err = os.Symlink(p, filepath.Join(bin, name))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		_, stderr, err := e.run("PATH=" + bin)
		if err == nil || !strings.Contains(stderr, "error: opencode is not in PATH") {
			t.Errorf("%v: %s", err, stderr)
		}
	})
}
