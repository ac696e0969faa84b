//go:build e2e

package e2e

import (
	"encoding/base64"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func basicAuth() string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

// script puts a file of testdata beside the clients' node_modules.
func script(t *testing.T, name string) string {
	t.Helper()
	modules := nodeModules(t)
	dir := t.TempDir()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(modules, filepath.Join(dir, "node_modules")); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, name)
}

// named returns a command line that runs args where the session's host name
// means this machine. Browsers and curl know that by themselves; for others it
// depends on the machine's resolver, so they see an /etc/hosts of their own.
func named(t *testing.T, session string, args ...string) []string {
	t.Helper()
	hosts := filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(hosts, []byte("127.0.0.1 localhost "+session+".localhost\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return append([]string{"unshare", "--mount", "sh", "-c", `mount --bind "$0" /etc/hosts && exec "$@"`, hosts}, args...)
}

// home is the environment of a client that has never run here before.
func home(t *testing.T) []string {
	dir := t.TempDir()
	return cleanEnv("HOME="+dir, "XDG_CONFIG_HOME="+dir+"/config", "XDG_DATA_HOME="+dir+"/data", "XDG_STATE_HOME="+dir+"/state",
		"XDG_CACHE_HOME="+dir+"/cache", "OPENCODE_DISABLE_AUTOUPDATE=1", "OPENCODE_DISABLE_MODELS_FETCH=1", "TERM=xterm-256color")
}

// TestClients runs clients that know nothing of Cloud Code, with Basic Auth on.
func TestClients(t *testing.T) {
	f := shared(t)
	id := f.session(t, "clients", nil)
	host := "http://" + f.host(id)
	oc := f.openCode(id)

	t.Run("SDK", func(t *testing.T) {
		file := script(t, "sdk.mjs")
		for name, base := range map[string]string{"by host": host, "by path": f.url("/v1/sessions/" + id + "/proxy")} {
			t.Run(name, func(t *testing.T) {
				cmd := named(t, id, "node", file, base, basicAuth(), "write sdk.txt "+name)
				out := mustRun(t, 90*time.Second, home(t), cmd[0], cmd[1:]...)
				var got struct {
					Chat, Text      string
					Listed, SawIdle bool
					Types           []string
				}
				if err := json.Unmarshal([]byte(out), &got); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				if want := "Wrote sdk.txt, and bash said: 0\n" + strings.ToUpper(name); strings.TrimSpace(got.Text) != want {
					t.Errorf("the answer is %q, not %q", got.Text, want)
				}
				if !got.Listed || !got.SawIdle || !slices.Contains(got.Types, "message.part.updated") {
					t.Errorf("%+v", got)
				}
			})
		}
	})

	opencode := func(t *testing.T) string {
		return filepath.Join(nodeModules(t), "opencode-linux-x64", "bin", "opencode")
	}

	t.Run("opencode run --attach", func(t *testing.T) {
		cmd := named(t, id, opencode(t), "run", "--attach", host, "-u", user, "-p", password, "--dir", projectDir, "write run.txt by run")
		stdout, stderr, err := run(t, 90*time.Second, home(t), cmd[0], cmd[1:]...)
		// The tools' output is what it shows; the last text it leaves out, also
		// without a gateway.
		if err != nil || !strings.Contains(stdout+stderr, "BY RUN") {
			t.Fatalf("%v\n%s\n%s", err, stdout, stderr)
		}
		if b, err := os.ReadFile(f.hostFile(t, id, "run.txt")); err != nil || strings.TrimSpace(string(b)) != "by run" {
			t.Errorf("run.txt on the node: %q %v", b, err)
		}
		// A wrong password is the gateway's to refuse.
		cmd = named(t, id, opencode(t), "run", "--attach", host, "-u", user, "-p", "wrong", "--dir", projectDir, "hello intruder")
		if stdout, _, err := run(t, 60*time.Second, home(t), cmd[0], cmd[1:]...); strings.Contains(stdout, "You said") || model(t).asked("hello intruder") > 0 {
			t.Errorf("with a wrong password: %v %s", err, stdout)
		}
	})

	t.Run("opencode attach", func(t *testing.T) {
		for name, base := range map[string]string{"by host": host, "by path": f.url("/v1/sessions/" + id + "/proxy")} {
			t.Run(name, func(t *testing.T) {
				attach(t, named(t, id, opencode(t), "attach", base, "-u", user, "-p", password, "--dir", projectDir), "hello from the terminal")
			})
		}
	})

	t.Run("grpcurl", func(t *testing.T) {
		token, err := os.ReadFile(filepath.Join(f.serverDir, "server", "token"))
		if err != nil {
			t.Fatal(err)
		}
		grpcurl := func(auth string, args ...string) (string, error) {
			all := append([]string{"tool", "-modfile=" + filepath.Join(work.repo, "tools", "go.mod"), "grpcurl", "-cacert", f.caFile(), "-H", "authorization: " + auth}, args...)
			out, errOut, err := run(t, 4*time.Minute, os.Environ(), "go", all...)
			return out + errOut, err
		}
		bearer := "Bearer " + strings.TrimSpace(string(token))
		for _, auth := range []string{bearer, basicAuth()} {
			out, err := grpcurl(auth, f.grpcAddr, "list")
			for _, want := range []string{"cloudcode.v1.SessionService", "cloudcode.v1.NodeService", "grpc.health.v1.Health"} {
				if err != nil || !strings.Contains(out, want) {
					t.Errorf("list lacks %s: %v %s", want, err, out)
				}
			}
			out, err = grpcurl(auth, "-d", `{"name":"sessions/`+id+`"}`, f.grpcAddr, "cloudcode.v1.SessionService/GetSession")
			if err != nil || !strings.Contains(out, `"state": "RUNNING"`) {
				t.Errorf("GetSession: %v %s", err, out)
			}
		}
		if out, err := grpcurl("Bearer wrong", "-d", `{}`, f.grpcAddr, "cloudcode.v1.SessionService/ListSessions"); err == nil || !strings.Contains(out, "Unauthenticated") {
			t.Errorf("with a wrong token: %v %s", err, out)
		}
	})

	t.Run("browser", func(t *testing.T) {
		needReal(t, "chromium")
		chromium, err := exec.LookPath("chromium")
		if err != nil {
			t.Fatal(err)
		}
		chat := oc.newChat(t)
		oc.prompt(t, chat, "hello before the browser")
		shots := work.keep
		if shots == "" {
			shots = t.TempDir()
		}
		options, err := json.Marshal(map[string]string{
			"chromium": chromium, "dashboard": f.url("/"), "session": id, "chat": chat, "shots": shots,
			"web":    host + "/" + base64.RawURLEncoding.EncodeToString([]byte(projectDir)) + "/session/" + chat,
			"answer": "You said: hello before the browser", "user": user, "password": password,
		})
		if err != nil {
			t.Fatal(err)
		}
		out := mustRun(t, 4*time.Minute, home(t), "node", script(t, "browser.mjs"), string(options))
		var got struct {
			Steps, Console     []string
			Error, Text, Title string
			Events             []struct{ Type, ID string }
		}
		if err := json.Unmarshal([]byte(out), &got); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if got.Error != "" {
			t.Fatalf("%s\nafter %q\nconsole %q\nevents %v\npage:\n%s", got.Error, got.Steps, got.Console, got.Events, got.Text)
		}
		if len(got.Events) == 0 || got.Events[0].Type != "lifecycle" || got.Events[0].ID == "" {
			t.Errorf("the EventSource's events: %v", got.Events)
		}
		t.Logf("page %q, %d events, console: %q", got.Title, len(got.Events), got.Console)
	})
}

// attach runs OpenCode's terminal UI in a terminal and, unless text is empty,
// types it and waits for the answer on the screen.
func attach(t *testing.T, command []string, text string) {
	needReal(t, "tmux")
	env := home(t)
	socket := filepath.Join(t.TempDir(), "tmux")
	tmux := func(args ...string) string {
		return mustRun(t, 20*time.Second, env, "tmux", append([]string{"-S", socket, "-f", "/dev/null"}, args...)...)
	}
	tmux(append([]string{"new-session", "-d", "-x", "130", "-y", "45", "-s", "e2e", "--"}, command...)...)
	pid := strings.TrimSpace(tmux("display-message", "-p", "-t", "e2e", "#{pane_pid}"))
	defer func() {
		tmux("kill-server")
		eventually(t, 10*time.Second, "the terminal UI ends", func() string {
			if _, err := os.Stat("/proc/" + pid); err == nil {
				return "it runs"
			}
			return ""
		})
	}()
	shows := func(what string) {
		t.Helper()
		eventually(t, 60*time.Second, "screen shows "+what, func() string {
			if s := tmux("capture-pane", "-p", "-t", "e2e"); !strings.Contains(s, what) {
				return "\n" + s
			}
			return ""
		})
	}
	shows("Ask anything")
	if text == "" {
		return
	}
	tmux("send-keys", "-t", "e2e", "-l", text)
	shows(text)
	tmux("send-keys", "-t", "e2e", "Enter")
	shows("You said: " + text)
}
