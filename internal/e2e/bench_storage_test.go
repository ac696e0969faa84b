//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// treeWork is what BenchmarkTree times, with what is done before and not timed.
var treeWork = []struct{ what, before, command string }{
	{
		"git commit of 200 files", `rm -rf bench; git init -q bench; cd bench; git config user.name a; git config user.email a@example.com; for i in $(seq 200); do seq $i $((i+200)) > file$i; done`,
		`git add -A && git commit -qm "200 files"`,
	},
	{"git status", `cd bench; touch file1 file2; sync -f .`, `git status --porcelain`},
	{
		"npm install", `rm -rf bench-npm /tmp/bench-lib; mkdir -p bench-npm /tmp/bench-lib/files; cd /tmp/bench-lib; for i in $(seq 500); do seq $i $((i+50)) > files/f$i.js; done
echo '{"name":"bench-lib","version":"1.0.0","bin":{"bench-tool":"files/f1.js"}}' > package.json; export npm_config_update_notifier=false; npm pack --silent >/dev/null; cd ` + projectDir + `/bench-npm; npm init -y >/dev/null`,
		`npm install --offline --no-audit --no-fund /tmp/bench-lib/bench-lib-1.0.0.tgz >/dev/null 2>&1`,
	},
}

// BenchmarkTree compares work of an agent in the tree of a session that is
// checkpointed with the same on a session that is only on the machine's disk, by
// turns. Checkpoints are made meanwhile: chats are busy.
func BenchmarkTree(b *testing.B) {
	s := withStorage(b)
	sessions := map[string]string{
		"SNAPSHOT": s.session(b, "tree-snap", spec(s.a, &cloudcodev1.Storage{Mode: cloudcodev1.Storage_SNAPSHOT})),
		"disk":     s.session(b, "tree-disk", spec(s.a, &cloudcodev1.Storage{Mode: cloudcodev1.Storage_LOCAL})),
	}
	const rounds = 9
	times := map[string]map[string][]time.Duration{}
	for _, w := range treeWork {
		times[w.what] = map[string][]time.Duration{}
	}
	for round := range rounds + 1 {
		for i := range 2 {
			mode := []string{"SNAPSHOT", "disk"}[(i+round)%2]
			for _, w := range treeWork {
				out := s.bash(b, sessions[mode], `{ `+w.before+`; } >/dev/null || exit 1
t=$(date +%s%N); `+w.command+` >/dev/null || exit 1; echo took $(($(date +%s%N) - t))`)
				ns, err := strconv.ParseInt(strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(out), "took ")), 10, 64)
				if err != nil {
					b.Fatalf("%s: %s", w.what, out)
				}
				if round > 0 { // the first is for caches
					times[w.what][mode] = append(times[w.what][mode], time.Duration(ns))
				}
			}
		}
	}
	b.ReportMetric(0, "ns/op")
	fmt.Printf("working in the tree, medians of %d on %d CPUs (aim 1.0 times):\n", rounds, runtime.NumCPU())
	for _, w := range treeWork {
		snap, disk := median(times[w.what]["SNAPSHOT"]), median(times[w.what]["disk"])
		ratio := float64(snap) / float64(disk)
		b.ReportMetric(ratio, strings.ReplaceAll(w.what, " ", "-")+"-ratio")
		fmt.Printf("  %-24s SNAPSHOT %v, the machine's disk %v: %.2f times\n", w.what, snap.Round(time.Millisecond/10), disk.Round(time.Millisecond/10), ratio)
	}
}

// BenchmarkTraffic counts what prompts send to the object store: with checkpoints,
// and with OpenCode's data on TigrisFS that is flushed every second, which is what
// it takes there to lose as little.
func BenchmarkTraffic(b *testing.B) {
	s := withStorage(b)
	const prompts = 10
	type traffic struct{ requests, bytes int64 }
	count := func() traffic {
		sent, _ := s.store.proxy.Bytes()
		n := 0
		for _, c := range s.store.server.Requests() {
			n += c
		}
		return traffic{int64(n), sent}
	}
	say := func(i int) string { return fmt.Sprintf("work t%d 4", i) }
	report := func(what string, before, after traffic) {
		requests, bytes := float64(after.requests-before.requests)/prompts, float64(after.bytes-before.bytes)/prompts
		b.ReportMetric(requests, what+"-requests/prompt")
		b.ReportMetric(bytes/1000, what+"-kB/prompt")
		fmt.Printf("%-9s %5.1f requests and %7.1f kB sent per prompt (4 tool calls with a commit each, then a second of quiet)\n", what, requests, bytes/1000)
	}
	b.ReportMetric(0, "ns/op")

	id := s.session(b, "traffic", spec(s.a, nil))
	oc := s.openCode(id)
	events := s.follow(b, id)
	chat := oc.newChat(b)
	oc.prompt(b, chat, say(0))
	oc.waitSaved(b, events, chat)
	before := count()
	for i := range prompts {
		oc.prompt(b, chat, say(i+1))
		pauseFor(context.Background(), time.Second)
	}
	oc.waitSaved(b, events, chat)
	report("SNAPSHOT", before, count())
	events.close()
	s.remove(b, id)

	if _, err := exec.LookPath("tigrisfs"); err != nil {
		fmt.Println("tigrisfs is not in PATH: not measured")
		return
	}
	fs := s.benchTigrisFS(b)
	fs.prompt(b, say(0))
	before = count()
	for i := range prompts {
		fs.prompt(b, say(i+1))
		pauseFor(context.Background(), time.Second)
	}
	fs.flushed(b)
	report("TigrisFS", before, count())
}

// flushedFS is an OpenCode whose folders are all on TigrisFS, as in the original
// project, with a flush every second.
type flushedFS struct {
	dir, base, chat string
	flush           func() error
	oc              *openCode
}

func (s *storageFleet) benchTigrisFS(b *testing.B) *flushedFS {
	b.Helper()
	opencode := filepath.Join(nodeModules(b), "opencode-linux-x64", "bin", "opencode")
	dir := filepath.Join(b.TempDir(), "s3")
	if err := os.Mkdir(dir, 0o755); err != nil {
		b.Fatal(err)
	}
	started := func(name string, env []string, cwd string, args ...string) *exec.Cmd {
		cmd := exec.Command(name, args...)
		cmd.Env, cmd.Dir = append(cleanEnv(), env...), cwd
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		return cmd
	}
	mounter := started("tigrisfs", []string{"AWS_ACCESS_KEY_ID=" + s.store.config.AccessKeyID, "AWS_SECRET_ACCESS_KEY=" + s.store.config.SecretAccessKey}, "",
		"--enable-perms", "--enable-specials", "--endpoint", s.store.config.Endpoint, "--region", s.store.config.Region, "-f", s.store.config.Bucket+":traffic", dir)
	b.Cleanup(func() {
		_ = unix.Unmount(dir, unix.MNT_DETACH)
		_ = syscall.Kill(-mounter.Process.Pid, syscall.SIGKILL)
		_ = mounter.Wait()
	})
	eventually(b, 20*time.Second, "TigrisFS mounts", func() string {
		if len(mountsBelow(dir)) == 0 {
			return "no mount"
		}
		return ""
	})
	project := filepath.Join(dir, "workspace", "project")
	if err := os.MkdirAll(project, 0o755); err != nil {
		b.Fatal(err)
	}
	root, err := os.Open(dir)
	if err != nil {
		b.Fatal(err)
	}
	flush := func() error { return root.Sync() }
	ctx, cancel := context.WithCancel(context.Background())
	var flusher sync.WaitGroup
	flusher.Go(func() {
		for ctx.Err() == nil {
			_ = flush() // what fails is sent with the next one
			pauseFor(ctx, time.Second)
		}
	})
	port := freePort(b)
	server := started(opencode, []string{
		"HOME=" + b.TempDir(), "XDG_DATA_HOME=" + filepath.Join(dir, ".opencode/data"), "XDG_STATE_HOME=" + filepath.Join(dir, ".opencode/state"),
		"XDG_CONFIG_HOME=" + b.TempDir(), "XDG_CACHE_HOME=" + b.TempDir(), "OPENCODE_DISABLE_MODELS_FETCH=1", "OPENCODE_DISABLE_AUTOUPDATE=1",
		"OPENCODE_CONFIG_CONTENT=" + model(b).config("127.0.0.1"),
	}, project, "serve", "--hostname", "127.0.0.1", "--port", port)
	b.Cleanup(func() {
		_ = syscall.Kill(-server.Process.Pid, syscall.SIGKILL)
		_ = server.Wait()
		cancel()
		flusher.Wait()
		_ = root.Close()
	})
	f := &flushedFS{dir: dir, base: "http://127.0.0.1:" + port, flush: flush}
	direct := &fleet{http: &http.Client{Transport: &http.Transport{DialContext: (&net.Dialer{}).DialContext}}}
	b.Cleanup(direct.http.CloseIdleConnections)
	oc := &openCode{f: direct, base: f.base}
	eventually(b, 30*time.Second, "OpenCode answers", func() string {
		ctx, cancel := context.WithTimeout(context.Background(), 250*time.Millisecond)
		defer cancel()
		if err := oc.try(ctx, "GET", "/global/health", nil, nil); err != nil {
			return err.Error()
		}
		return ""
	})
	f.chat = oc.newChat(b)
	f.oc = oc
	return f
}

func (f *flushedFS) prompt(b *testing.B, text string) {
	b.Helper()
	f.oc.prompt(b, f.chat, strings.ReplaceAll(text, projectDir, filepath.Join(f.dir, "workspace", "project")))
}

func (f *flushedFS) flushed(b *testing.B) {
	b.Helper()
	if err := f.flush(); err != nil {
		b.Fatal(err)
	}
}
