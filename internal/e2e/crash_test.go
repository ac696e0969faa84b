//go:build e2e

package e2e

import (
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// What the documents promise.
const (
	mostChatLost  = 2 * time.Second
	mostFilesLost = 5 * time.Second
)

var (
	crashRounds = flag.Int("crash.rounds", envInt("CLOUDCODE_CRASH_ROUNDS", 24), "kills of the crash suite; $CLOUDCODE_CRASH_ROUNDS")
	crashSeed   = flag.Uint64("crash.seed", 0, "of the crash suite's moments and victims; 0: a new one")
	crashOnly   = flag.String("crash.only", "", "victims of the crash suite, separated by commas; empty: all")
)

func envInt(name string, otherwise int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return n
	}
	return otherwise
}

// victims of the crash suite, each as often as its weight.
var victims = []struct {
	name   string
	weight int
}{
	{"opencode", 3},
	{"mounter", 2},
	{"nodeagent", 3},
	{"containerd", 2},
	{"s3", 3},
	{"all", 3},            // everything on the machine; its disk is still there
	{"all and disk", 7},   // the session comes back from the bucket
	{"s3, all, disk", 2},  // the bucket is away at that moment, too
	{"all, elsewhere", 1}, // it comes back on the other machine
}

// crash is one session that is killed again and again.
type crash struct {
	*storageFleet
	id     string
	oc     *openCode
	events *watcher
	random *rand.Rand
	had    map[string]bool // files and commits of earlier rounds: all saved
	chats  []string
	lost   map[string][]loss // by victim
}

type loss struct{ chat, files time.Duration }

// TestCrash kills what runs, at random moments of a prompt, and checks the
// promise: all that a `checkpointed` event covers is there; beyond it little is
// lost; and what comes back is one moment, never a mixture of two.
func TestCrash(t *testing.T) {
	s := withStorage(t)
	seed := *crashSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("again with: -run TestCrash$ -crash.seed %d -crash.rounds %d", seed, *crashRounds)
	c := &crash{
		storageFleet: s, id: s.session(t, "crash", spec(s.a, nil)), random: rand.New(rand.NewPCG(seed, 0)),
		had: map[string]bool{}, lost: map[string][]loss{},
	}
	c.oc, c.events = s.openCode(c.id), s.follow(t, c.id)
	var deck []string
	for round := range *crashRounds {
		if len(deck) == 0 { // shuffled, so that each has its turn
			for _, v := range victims {
				if *crashOnly == "" || slices.Contains(strings.Split(*crashOnly, ","), v.name) {
					deck = append(deck, slices.Repeat([]string{v.name}, v.weight)...)
				}
			}
			c.random.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
		}
		victim := deck[0]
		deck = deck[1:]
		if !t.Run(fmt.Sprintf("%03d %s", round, victim), func(t *testing.T) { c.round(t, round, victim) }) {
			break // what follows builds on it
		}
	}
	c.report(t)
}

// report prints the distribution of what was lost.
func (c *crash) report(t *testing.T) {
	var out strings.Builder
	fmt.Fprintf(&out, "lost by kill -9, promised at most %v of chat and %v of files:\n%-16s %6s   %-28s %s\n", mostChatLost, mostFilesLost, "victim", "rounds", "chat p50/p90/max", "files p50/p90/max")
	line := func(name string, list []loss) {
		if len(list) == 0 {
			return
		}
		quantiles := func(of func(loss) time.Duration) string {
			var d []time.Duration
			for _, l := range list {
				d = append(d, of(l).Round(time.Millisecond))
			}
			slices.Sort(d)
			return fmt.Sprintf("%v / %v / %v", d[len(d)/2], d[len(d)*9/10], d[len(d)-1])
		}
		fmt.Fprintf(&out, "%-16s %6d   %-28s %s\n", name, len(list), quantiles(func(l loss) time.Duration { return l.chat }), quantiles(func(l loss) time.Duration { return l.files }))
	}
	for _, v := range victims {
		line(v.name, c.lost[v.name])
	}
	var gone []loss
	for name, list := range c.lost {
		if strings.Contains(name, "disk") || strings.Contains(name, "elsewhere") {
			gone = append(gone, list...)
		}
	}
	line("all losses of a machine", gone)
	fmt.Print(out.String())
}

// item is something that a client saw in the chat.
type item struct {
	what  string
	saved time.Time // by OpenCode's clock
	seen  time.Time
}

// items are the chat's complete parts, by id, as events showed them until then.
func (c *crash) items(chat string, until time.Time) map[string]item {
	out := map[string]item{}
	for _, e := range c.events.list() {
		if e.kind != "opencode" || e.at.After(until) || !strings.Contains(e.data, `"message.part.updated"`) || !strings.Contains(e.data, chat) {
			continue
		}
		var f struct {
			Payload struct {
				Properties struct {
					Part struct {
						ID, Type, Text string
						Time           struct{ End float64 }
						State          struct{ Status, Output string }
					}
					Time float64
				}
			}
		}
		if json.Unmarshal([]byte(e.data), &f) != nil {
			continue
		}
		p := f.Payload.Properties.Part
		if p.Type == "text" && p.Time.End > 0 || p.Type == "tool" && p.State.Status == "completed" {
			if _, had := out[p.ID]; !had {
				out[p.ID] = item{p.Text + strings.TrimSpace(p.State.Output), time.UnixMilli(int64(f.Payload.Properties.Time)), e.at}
			}
		}
	}
	return out
}

// lastSaved is the newest checkpoint that an event had named by then.
func (c *crash) lastSaved(until time.Time) time.Time {
	var t time.Time
	for _, e := range c.events.list() {
		if p := e.checkpoint(); p != nil && !e.at.After(until) && p.GetCreateTime().AsTime().After(t) {
			t = p.GetCreateTime().AsTime()
		}
	}
	return t
}

// files of the agent's folder, and when each was written, as the disk of the
// machine holds them.
func (c *crash) filesOn(tb testing.TB, h *nodeHost) map[string]time.Time {
	tb.Helper()
	dir := filepath.Join(h.volumeDir(c.id), "data", "s3", "workspace", "project", "work")
	found, err := filepath.Glob(filepath.Join(dir, "r*-*.txt"))
	if err != nil {
		tb.Fatal(err)
	}
	out := map[string]time.Time{}
	for _, f := range found {
		b, err := os.ReadFile(f)
		if err != nil {
			tb.Fatal(err)
		}
		if w := strings.Fields(string(b)); len(w) == 3 {
			out[strings.TrimSuffix(filepath.Base(f), ".txt")] = stamp(tb, w[2])
		} else if len(b) > 0 {
			tb.Errorf("%s holds %q", f, b)
		}
	}
	return out
}

// stamp reads what `date +%s.%N` writes.
func stamp(tb testing.TB, s string) time.Time {
	tb.Helper()
	seconds, nanos, _ := strings.Cut(s, ".")
	sec, err := strconv.ParseInt(seconds, 10, 64)
	ns, err2 := strconv.ParseInt(nanos, 10, 64)
	if err != nil || err2 != nil {
		tb.Fatalf("time %q", s)
	}
	return time.Unix(sec, ns)
}

// verifyScript checks the repository and OpenCode's database, and prints files
// and commits. A lock that git left behind is what a kill leaves on any disk.
const verifyScript = `set -e; cd work; rm -f .git/index.lock .git/HEAD.lock .git/refs/heads/*.lock
git fsck --full --strict --no-dangling >/tmp/fsck 2>&1 || { echo "FSCK"; cat /tmp/fsck; }
python3 - <<'P'
import glob, os, sqlite3, subprocess
for db in glob.glob(os.environ["XDG_DATA_HOME"] + "/opencode/*.db"):
    c = sqlite3.connect(db, timeout=20)
    r = c.execute("PRAGMA integrity_check").fetchall()
    if r != [("ok",)]: print("DATABASE", db, r)
log = open("log.txt").read() if os.path.exists("log.txt") else ""
for name in sorted(os.listdir(".")):
    if name.startswith("r") and name.endswith(".txt"):
        text = open(name).read().split()
        if len(text) != 3 or "-".join(text[:2]) != name[:-4]: print("BROKEN", name, text)
        else: print("FILE", name[:-4])
# A commit holds its own file and those of all commits before it, as written then.
want = []
for line in subprocess.run(["git", "log", "--reverse", "--format=%H %s"], capture_output=True, text=True).stdout.splitlines():
    commit, key, number = line.split(); want.append(key + "-" + number); print("COMMIT", want[-1])
if want:
    have = subprocess.run(["git", "ls-tree", "--name-only", "HEAD"], capture_output=True, text=True).stdout.split()
    for w in want:
        if w + ".txt" not in have: print("MIXTURE", w, "is committed without its file")
        if not os.path.exists(w + ".txt"): print("MIXTURE", w, "is committed and its file is not there")
        if w.replace("-", " ") + " " not in log: print("MIXTURE", w, "is not in the log")
    dirty = subprocess.run(["git", "diff", "--name-only", "HEAD", "--", "r*.txt"], capture_output=True, text=True).stdout.split()
    for d in dirty:
        if d[:-4] in want: print("MIXTURE", d, "differs from its commit")
P`

func (c *crash) round(t *testing.T, round int, victim string) {
	key := fmt.Sprintf("r%d", round)
	h := c.hostOf(t, c.id)
	before := c.get(t, c.id)
	chat := c.oc.newChat(t)
	c.oc.begin(t, chat, "work "+key+" 60")
	eventually(t, 30*time.Second, "the agent works", func() string {
		for _, i := range c.items(chat, time.Now()) {
			if strings.HasPrefix(i.what, "done "+key) {
				return ""
			}
		}
		return "no tool call is done"
	})
	<-time.After(time.Duration(c.random.IntN(2500)) * time.Millisecond) // any moment
	when := time.Now()
	var onDisk map[string]time.Time
	gone := false // the session must come back from the bucket
	container := h.containerPID(t, c.id)
	switch victim {
	case "opencode":
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%s/task/%s/children", container, container))
		pid, err := strconv.Atoi(strings.Fields(string(children) + " ?")[0])
		if err != nil {
			t.Fatalf("children of the container's first process: %q", children)
		}
		when = time.Now()
		_ = syscall.Kill(pid, syscall.SIGKILL)
		c.waitSession(t, c.id, "restarted", func(s *cloudcodev1.Session) bool {
			return s.GetState() == cloudcodev1.Session_RUNNING && s.GetRestartCount() > before.GetRestartCount()
		})
	case "mounter":
		for _, p := range h.mounterPIDs(c.id) {
			_ = syscall.Kill(p, syscall.SIGKILL)
		}
		c.goesOn(t, chat, key, when)
	case "nodeagent":
		when = time.Now()
		h.node.kill(t)
		h.restart(t)
		c.goesOn(t, chat, key, time.Now())
	case "containerd":
		for _, p := range h.pids() {
			if exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", p)); filepath.Base(exe) == "containerd" {
				_ = syscall.Kill(p, syscall.SIGKILL)
			}
		}
		if within(3*time.Second, func() bool { return !h.node.running() }) {
			h.node.start(t) // as its supervisor would
		}
		h.waitNode(t)
		c.goesOn(t, chat, key, time.Now())
	case "s3":
		c.store.server.Kill()
		<-time.After(time.Duration(c.random.IntN(4000)) * time.Millisecond)
		c.store.server.Start()
		c.goesOn(t, chat, key, time.Now())
	case "all":
		when = h.die(t)
		onDisk = c.filesOn(t, h)
		h.restart(t)
	case "all and disk", "s3, all, disk", "all, elsewhere":
		gone = true
		if strings.HasPrefix(victim, "s3") {
			c.store.server.Kill()
		}
		when = h.die(t)
		onDisk = c.filesOn(t, h)
		if strings.HasPrefix(victim, "s3") {
			<-time.After(time.Duration(c.random.IntN(2000)) * time.Millisecond)
			c.store.server.Start()
		}
		if victim == "all, elsewhere" {
			c.waitState(t, c.id, cloudcodev1.Session_LOST)
			other := c.a
			if h == c.a {
				other = c.b
			}
			c.resume(t, c.id, other)
			h.restart(t)
			h.waitEnded(t, c.id)
			h = other
		} else {
			h.forget(t, c.id)
			h.restart(t)
		}
	}
	if onDisk != nil {
		// The server may still say RUNNING of before: OpenCode answers once it is true.
		eventually(t, 60*time.Second, "the session is back", func() string {
			if s := c.get(t, c.id); s.GetState() != cloudcodev1.Session_RUNNING {
				return s.String()
			}
			if err := c.oc.try(bounded(t, 5*time.Second), "GET", "/session", nil, nil); err != nil {
				return err.Error()
			}
			if _, stderr, err := h.tryExec(t, c.id, "true"); err != nil {
				return fmt.Sprint(err, stderr)
			}
			return ""
		})
	} else {
		if victim != "opencode" {
			if now := h.containerPID(t, c.id); now != container {
				t.Errorf("the container's process is %s, was %s", now, container)
			}
		}
		// What still works is stopped, so that what is looked at stands still.
		c.oc.do(t, "POST", "/session/"+chat+"/abort", nil, nil)
		eventually(t, 20*time.Second, "the chat is idle", func() string {
			var busy map[string]struct{ Type string }
			if err := c.oc.try(bounded(t, 5*time.Second), "GET", "/session/status", nil, &busy); err != nil {
				return err.Error()
			}
			if s := busy[chat].Type; s != "" && s != "idle" {
				return s
			}
			return ""
		})
		onDisk = c.filesOn(t, h)
		for name, at := range onDisk {
			if at.After(when) {
				delete(onDisk, name)
			}
		}
	}
	c.check(t, h, victim, chat, when, gone, onDisk)

	// Life goes on, and what is there now is saved.
	if a := c.oc.prompt(t, c.oc.newChat(t), "hello after "+key).text(); a != "You said: hello after "+key {
		t.Errorf("the next prompt is answered with %q", a)
	}
	next := c.oc.newChat(t)
	c.oc.prompt(t, next, "bash "+workStep(key, 0))
	c.oc.waitSaved(t, c.events, next)
	c.chats = append(c.chats, next) // the one that was killed may have been too young to be saved
}

// goesOn waits until the agent has done something after a moment.
func (c *crash) goesOn(t *testing.T, chat, key string, since time.Time) {
	t.Helper()
	eventually(t, 60*time.Second, "the agent goes on", func() string {
		for _, i := range c.items(chat, time.Now()) {
			if i.saved.After(since) {
				return ""
			}
		}
		return "nothing new in the chat"
	})
}

// check compares what there is with what was promised.
func (c *crash) check(t *testing.T, h *nodeHost, victim, chat string, when time.Time, gone bool, onDisk map[string]time.Time) {
	t.Helper()
	out := h.exec(t, c.id, verifyScript)
	files, commits := map[string]bool{}, map[string]bool{}
	for line := range strings.Lines(out) {
		switch word, rest, _ := strings.Cut(strings.TrimSpace(line), " "); word {
		case "FILE":
			files[rest] = true
		case "COMMIT":
			commits[rest] = true
		default:
			t.Errorf("after the kill: %s", line)
		}
	}
	saved := c.lastSaved(when)
	var l loss
	for name, at := range onDisk {
		if files[name] {
			continue
		}
		l.files = max(l.files, when.Sub(at))
		if !at.After(saved) {
			t.Errorf("file %s of %v is lost, though all up to %v was said to be saved", name, at, saved)
		}
	}
	list, err := c.oc.messages(bounded(t, 20*time.Second), chat)
	if err != nil && !strings.Contains(err.Error(), "404") {
		t.Errorf("the chat: %v", err)
	}
	here := map[string]bool{}
	for _, m := range list {
		for _, p := range m.Parts {
			if p.Type == "text" && p.Text != "" || p.Type == "tool" && p.State.Status == "completed" {
				here[p.ID] = true
			}
			// One moment: what the chat says was done is done. (A step's commit
			// comes before its answer.)
			if w := strings.Fields(p.State.Output); p.Type == "tool" && p.State.Status == "completed" && len(w) == 4 && w[0] == "done" {
				if name := w[1] + "-" + w[2]; !commits[name] || !files[name] {
					t.Errorf("the chat says that %s is done, and it is not there", name)
				}
			}
		}
	}
	for id, i := range c.items(chat, when) {
		if here[id] {
			continue
		}
		l.chat = max(l.chat, when.Sub(i.seen))
		if !i.saved.After(saved) {
			t.Errorf("%q of %v is lost from the chat, though all up to %v was said to be saved", i.what, i.saved, saved)
		}
	}
	if victim != "s3, all, disk" { // then only what was said to be saved is promised
		if l.chat > mostChatLost {
			t.Errorf("%v of chat is lost", l.chat)
		}
		if l.files > mostFilesLost {
			t.Errorf("%v of files is lost", l.files)
		}
	}
	if !gone && l.files > 0 {
		t.Errorf("%v of files is lost, though the disk is not", l.files)
	}
	for name := range c.had {
		if !files[name] && !commits[name] {
			t.Errorf("%s of an earlier round is lost", name)
		}
	}
	// All chats of before can be read.
	for _, other := range c.chats {
		if list, err := c.oc.messages(bounded(t, 20*time.Second), other); err != nil || len(list) == 0 {
			t.Errorf("a chat of an earlier round: %d messages, %v", len(list), err)
		}
	}
	for name := range files {
		c.had[name] = true
	}
	c.lost[victim] = append(c.lost[victim], l)
	last := "no turn was saved before the kill"
	if !saved.IsZero() {
		last = fmt.Sprintf("the last turn was saved %v before the kill", when.Sub(saved).Round(time.Millisecond))
	}
	t.Logf("lost: %v of chat, %v of files; %s", l.chat.Round(time.Millisecond), l.files.Round(time.Millisecond), last)
}
