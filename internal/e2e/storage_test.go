//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// spec of a session on h.
func spec(h *nodeHost, s *cloudcodev1.Storage) *cloudcodev1.SessionSpec {
	return &cloudcodev1.SessionSpec{NodeSelector: on(h), Storage: s}
}

// seen is all of a session that must come back.
type seen struct {
	tree, repo string
	chats      map[string]string
}

func (s *storageFleet) look(tb testing.TB, h *nodeHost, id, script string, folders []string, chats ...string) seen {
	tb.Helper()
	out := seen{tree: h.tree(tb, id, script, folders...), chats: map[string]string{}}
	if script == treeScript {
		out.repo = h.repoState(tb, id)
	}
	for _, c := range chats {
		out.chats[c] = s.openCode(id).rawMessages(tb, c)
	}
	return out
}

func (want seen) same(tb testing.TB, when string, got seen) {
	tb.Helper()
	if want.tree != got.tree {
		tb.Errorf("%s: the files differ:\n%s", when, diffLines(want.tree, got.tree))
	}
	if want.repo != got.repo {
		tb.Errorf("%s: git differs:\n%s", when, diffLines(want.repo, got.repo))
	}
	for c, text := range want.chats {
		if got.chats[c] != text {
			tb.Errorf("%s: chat %s is\n%.2000s\nand was\n%.2000s", when, c, got.chats[c], text)
		}
	}
}

// TestSnapshot: everything that an agent did comes back on another machine, when
// it was suspended and when its machine is gone.
func TestSnapshot(t *testing.T) {
	s := withStorage(t)
	id := s.session(t, "snap", spec(s.a, nil))
	st := s.get(t, id).GetStorage()
	if st.GetMode() != cloudcodev1.Storage_SNAPSHOT || !st.GetPersistent() || !strings.HasPrefix(st.GetUri(), "s3://"+s.store.config.Bucket+"/fleet/"+id) {
		t.Errorf("storage of a session on S3 that is not Tigris's: %v", st)
	}
	oc := s.openCode(id)
	events := s.follow(t, id)
	chat := oc.newChat(t)
	doWork(t, oc, chat, "posix", "renames")
	began := time.Now()
	saved := oc.waitSaved(t, events, chat)
	t.Logf("the turn's checkpoint came %v after its end: %d files, %d bytes, %d sent, notes %q", time.Since(began).Round(time.Millisecond), saved.GetFiles(), saved.GetBytes(), saved.GetUploadedBytes(), saved.GetNotes())
	if !slices.ContainsFunc(saved.GetNotes(), func(n string) bool { return strings.Contains(n, "socket") }) {
		t.Errorf("no note says that a socket was left out: %q", saved.GetNotes())
	}
	// bucket/ shows objects, and is no part of the checkpoint.
	folders := []string{"/root/s3/workspace", "/root/s3/.opencode/config"}
	want := s.look(t, s.a, id, treeScript, folders, chat)

	t.Run("suspend and resume elsewhere", func(t *testing.T) {
		got := s.suspend(t, id)
		if got.GetNode() != "" || got.GetStorage().GetCheckpoint().GetId() < saved.GetId() {
			t.Errorf("suspended, it is %v", got)
		}
		s.a.waitNothingOf(t, id)
		began := time.Now()
		got = s.resume(t, id, s.b)
		t.Logf("running on the other machine after %v", time.Since(began).Round(time.Millisecond))
		if got.GetGeneration() != 2 {
			t.Errorf("generation %d", got.GetGeneration())
		}
		want.same(t, "on the other machine", s.look(t, s.b, id, treeScript, folders, chat))
		if out := s.b.exec(t, id, "cd app && node_modules/.bin/e2e-tool && node_modules/.bin/linked"); out != "tool runs with its dependency\nlinked\n" {
			t.Errorf("tools of npm say %q", out)
		}
		if a := oc.prompt(t, chat, "hello after the move").text(); a != "You said: hello after the move" {
			t.Errorf("the next prompt is answered with %q", a)
		}
	})

	t.Run("the machine is gone", func(t *testing.T) {
		oc.prompt(t, chat, "bash git -C repo commit -qam 'on the other machine' && echo committed")
		oc.waitSaved(t, events, chat)
		want := s.look(t, s.b, id, treeScript, folders, chat)
		before := s.get(t, id)
		s.b.die(t)
		lost := s.waitState(t, id, cloudcodev1.Session_LOST)
		if !strings.Contains(lost.GetMessage(), "resume") {
			t.Errorf("LOST does not say what to do: %s: %s", lost.GetReason(), lost.GetMessage())
		}
		began := time.Now()
		got := s.resume(t, id, s.a)
		t.Logf("running on the other machine after %v", time.Since(began).Round(time.Millisecond))
		if got.GetGeneration() != before.GetGeneration()+1 {
			t.Errorf("generation %d, was %d", got.GetGeneration(), before.GetGeneration())
		}
		want.same(t, "after the machine was lost", s.look(t, s.a, id, treeScript, folders, chat))
		if a := oc.prompt(t, chat, "hello after the loss").text(); a != "You said: hello after the loss" {
			t.Errorf("the next prompt is answered with %q", a)
		}

		// The machine comes back with its old files: they are given up, and
		// nothing of the new owner changes.
		oc.waitSaved(t, events, chat)
		want = s.look(t, s.a, id, treeScript, folders, chat)
		s.b.restart(t)
		s.b.waitNothingOf(t, id)
		if now := s.get(t, id); now.GetNode() != "nodes/"+s.a.id || now.GetGeneration() != got.GetGeneration() || now.GetState() != cloudcodev1.Session_RUNNING {
			t.Errorf("after the old machine's return the session is %v", now)
		}
		want.same(t, "after the old machine's return", s.look(t, s.a, id, treeScript, folders, chat))
	})
}

// TestStaleOwner: a machine that is cut off while its session goes on elsewhere
// cannot change anything of it when it is back.
func TestStaleOwner(t *testing.T) {
	s := withStorage(t)
	id := s.session(t, "stale", spec(s.b, nil))
	oc := s.openCode(id)
	events := s.follow(t, id)
	chat := oc.newChat(t)
	oc.prompt(t, chat, "write kept.txt before the cut")
	oc.waitSaved(t, events, chat)

	// The daemon stands still, what it runs does not: it goes on writing.
	pid := s.b.containerPID(t, id)
	s.b.exec(t, id, "nohup sh -c 'while :; do date +%s.%N > stale.txt; sleep 0.1; done' >/dev/null 2>&1 &")
	if err := s.b.node.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer s.b.node.cmd.Process.Signal(syscall.SIGCONT)
	s.waitState(t, id, cloudcodev1.Session_LOST)
	s.resume(t, id, s.a)
	oc.prompt(t, chat, "write kept.txt after the move")
	saved := oc.waitSaved(t, events, chat)
	if err := s.b.node.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "the stale container ends", func() string {
		if _, err := os.Stat("/proc/" + pid); err == nil {
			return "it runs"
		}
		return ""
	})
	s.b.waitEnded(t, id)
	s.b.waitNode(t)
	// What was written there after the last checkpoint is in nobody's way, and not
	// thrown away either.
	eventually(t, 20*time.Second, "the node says where unsaved files are left", func() string {
		if d := s.b.volumeDir(id); d == "" || !strings.Contains(s.b.node.output(), "never saved") {
			return d
		}
		return ""
	})
	// All checkpoints from then on are the new owner's, and hold its file.
	if _, err := s.sessions.CheckpointSession(bounded(t, time.Minute), &cloudcodev1.CheckpointSessionRequest{Name: "sessions/" + id}); err != nil {
		t.Fatal(err)
	}
	newer := 0
	for _, c := range s.checkpoints(t, id) {
		if c.GetId() >= saved.GetId() {
			newer++
			if c.GetNode() != "nodes/"+s.a.id {
				t.Errorf("a checkpoint of the old owner: %v", c)
			}
		}
	}
	if newer < 2 {
		t.Errorf("%d checkpoints of the new owner", newer)
	}
	if out := s.a.exec(t, id, "cat kept.txt; ls stale.txt 2>&1 || true"); !strings.HasPrefix(out, "after the move") {
		t.Errorf("the new owner has %q", out)
	}
	if got := s.get(t, id); got.GetState() != cloudcodev1.Session_RUNNING || got.GetGeneration() != 2 {
		t.Errorf("the session is %v", got)
	}
}

// mounters that this machine has, with what a node daemon needs to take them.
func mounters(t *testing.T) []string {
	var list []string
	for _, m := range []string{"tigrisfs", "rclone"} {
		if _, err := exec.LookPath(m); err == nil {
			list = append(list, m)
		}
	}
	if len(list) == 0 {
		needReal(t, "rclone")
	}
	return list
}

// TestMount: in mode MOUNT files are objects that others see, and chats are
// checkpointed; both are there on another machine.
func TestMount(t *testing.T) {
	for _, m := range mounters(t) {
		t.Run(m, func(t *testing.T) { testMount(t, storageWith(t, m)) })
	}
}

func testMount(t *testing.T, s *storageFleet) {
	id := s.session(t, "mount", spec(s.a, &cloudcodev1.Storage{Mode: cloudcodev1.Storage_MOUNT}))
	if st := s.get(t, id).GetStorage(); st.GetMode() != cloudcodev1.Storage_MOUNT || !st.GetPersistent() || st.GetMountState() != cloudcodev1.StorageStatus_MOUNTED || st.GetMounter() != s.mounter {
		t.Errorf("storage is %v", st)
	}
	oc := s.openCode(id)
	events := s.follow(t, id)
	chat := oc.newChat(t)
	if s.mounter == "tigrisfs" {
		doWork(t, oc, chat, "renames")
	} else {
		doWork(t, oc, chat)
	}
	oc.waitSaved(t, events, chat)

	// Files are objects with plain keys, and objects are files.
	prefix := s.root + "/" + id + "/workspace/project/"
	eventually(t, time.Minute, "what the agent wrote is in the bucket", func() string {
		sizes := s.store.sizes(t, prefix)
		if len(sizes) < 300 || sizes[prefix+"large.bin"] != 50<<20 {
			return fmt.Sprintf("%d objects, large.bin %d bytes", len(sizes), sizes[prefix+"large.bin"])
		}
		return ""
	})
	s.store.put(t, prefix+"from-outside.txt", []byte("put by another program"))
	eventually(t, 2*time.Minute, "an object that another program put is a file", func() string {
		out, _, _ := s.a.tryExec(t, id, "cat from-outside.txt 2>&1")
		if out != "put by another program" {
			return out
		}
		return ""
	})
	for key := range s.store.sizes(t, s.root+"/"+id+"/.opencode/") {
		if strings.Contains(key, "opencode.db") {
			t.Errorf("the database is on the mount, where it is lost with the machine: %s", key)
		}
	}
	folders := []string{"/root/s3/workspace"}
	want := s.look(t, s.a, id, contentScript, folders, chat)

	t.Run("suspend and resume elsewhere", func(t *testing.T) {
		s.suspend(t, id)
		s.a.waitNothingOf(t, id)
		s.resume(t, id, s.b)
		want.same(t, "on the other machine", s.look(t, s.b, id, contentScript, folders, chat))
		if a := oc.prompt(t, chat, "hello after the move").text(); a != "You said: hello after the move" {
			t.Errorf("the next prompt is answered with %q", a)
		}
	})
	t.Run("the machine is gone", func(t *testing.T) {
		oc.prompt(t, chat, "write later.txt written on the other machine")
		oc.waitSaved(t, events, chat)
		want := s.look(t, s.b, id, contentScript, folders, chat)
		eventually(t, 30*time.Second, "the file is in the bucket", func() string {
			if s.store.sizes(t, prefix)[prefix+"later.txt.upper"] == 0 {
				return "it is not"
			}
			return ""
		})
		s.b.die(t)
		s.waitState(t, id, cloudcodev1.Session_LOST)
		s.resume(t, id, s.a)
		want.same(t, "after the machine was lost", s.look(t, s.a, id, contentScript, folders, chat))
		if a := oc.prompt(t, chat, "hello after the loss").text(); a != "You said: hello after the loss" {
			t.Errorf("the next prompt is answered with %q", a)
		}
		s.b.restart(t)
		s.b.waitNothingOf(t, id)
	})
	t.Run("the mounter dies", func(t *testing.T) { s.mounterDies(t, id, "/root/s3/workspace") })
}

// mounterDies kills the session's mounter, and stops it: both heal under the
// running container.
func (s *storageFleet) mounterDies(t *testing.T, id, folder string) {
	h := s.hostOf(t, id)
	container := h.containerPID(t, id)
	before := s.get(t, id).GetStorage().GetMessage()
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGSTOP} {
		pids := h.mounterPIDs(id)
		if len(pids) == 0 {
			t.Fatalf("no mounter of %s on %s", id, h.id)
		}
		for _, p := range pids {
			if err := syscall.Kill(p, sig); err != nil {
				t.Fatal(err)
			}
		}
		began := time.Now()
		// The folder answers again, inside, without a new container. The state says
		// so meanwhile.
		said := false
		eventually(t, 90*time.Second, "the mount answers again after "+sig.String(), func() string {
			if st := s.get(t, id).GetStorage(); st.GetMountState() != cloudcodev1.StorageStatus_MOUNTED && st.GetMessage() != "" {
				said = true
			}
			now := h.mounterPIDs(id)
			if len(now) == 0 || slices.ContainsFunc(now, func(p int) bool { return slices.Contains(pids, p) }) {
				return fmt.Sprintf("mounters %v, were %v", now, pids)
			}
			out, stderr, err := run(t, 5*time.Second, cleanEnv(), filepath.Join(work.libexec, "ctr"), "-a", h.containerd(t), "-n", "cloudcode", "task", "exec", "--exec-id", fmt.Sprintf("probe-%d", time.Now().UnixNano()), id, "stat", "-f", "-c", "%T", folder)
			if err != nil || !strings.Contains(out, "fuse") {
				return fmt.Sprint(out, stderr, err)
			}
			return ""
		})
		t.Logf("%v: healed after %v", sig, time.Since(began).Round(time.Millisecond))
		s.waitStorage(t, id, "MOUNTED", 30*time.Second, func(st *cloudcodev1.StorageStatus) bool {
			return st.GetMountState() == cloudcodev1.StorageStatus_MOUNTED && st.GetMessage() == before
		})
		if now := h.containerPID(t, id); now != container {
			t.Errorf("%v: the container's process is %s, was %s", sig, now, container)
		}
		if !said {
			t.Errorf("%v: the state did not say that the mount was away", sig)
		}
	}
	s.openCode(id).prompt(t, s.openCode(id).newChat(t), "write healed.txt after the mounter was back")
}

// TestBucketFolder: in mode SNAPSHOT the session's folder of the bucket is at
// /root/s3/bucket, and the work goes on whatever becomes of its mounter.
func TestBucketFolder(t *testing.T) {
	mounters(t)
	t.Parallel()
	s := withStorage(t)
	id := s.session(t, "folder", spec(s.a, nil))
	s.store.put(t, s.root+"/"+id+"/shared/data.csv", []byte("1,2,3"))
	s.waitStorage(t, id, "MOUNTED", 30*time.Second, func(st *cloudcodev1.StorageStatus) bool {
		return st.GetMountState() == cloudcodev1.StorageStatus_MOUNTED
	})
	eventually(t, 90*time.Second, "an object is seen in the folder", func() string {
		out, _, _ := s.a.tryExec(t, id, "cat /root/s3/bucket/shared/data.csv 2>&1")
		if out != "1,2,3" {
			return out
		}
		return ""
	})
	s.a.exec(t, id, "mkdir -p /root/s3/bucket/out && echo made inside > /root/s3/bucket/out/result.txt")
	eventually(t, 30*time.Second, "a file is an object", func() string {
		if got := string(s.store.get(t, s.root+"/"+id+"/out/result.txt")); got != "made inside\n" {
			return got
		}
		return ""
	})
	// Nobody inside sees or changes what Cloud Code keeps.
	if out, _, _ := s.a.tryExec(t, id, "ls -A /root/s3/bucket /root/s3; find /root/s3 -name .cloudcode 2>/dev/null"); strings.Contains(out, ".cloudcode") {
		t.Errorf("the session sees where its checkpoints are:\n%s", out)
	}
	s.mounterDies(t, id, "/root/s3/bucket")
	eventually(t, 20*time.Second, "the file is there when the mounter is back", func() string {
		out, _, _ := s.a.tryExec(t, id, "cat /root/s3/bucket/out/result.txt || { ls -laR /root/s3/bucket; grep /root/s3 /proc/mounts; }")
		if out != "made inside\n" {
			return out
		}
		return ""
	})
}

// TestKeysStayOutside looks for the object store's keys wherever a session, or
// another user of the machine, could find them.
func TestKeysStayOutside(t *testing.T) {
	t.Parallel()
	s := withStorage(t)
	id := s.session(t, "keys", &cloudcodev1.SessionSpec{NodeSelector: on(s.a), Storage: &cloudcodev1.Storage{S3: &cloudcodev1.S3Storage{
		Endpoint: s.store.config.Endpoint, Bucket: s.store.config.Bucket, AccessKeyId: s.store.config.AccessKeyID, SecretAccessKey: s.store.config.SecretAccessKey, PathStyle: true, Prefix: "own-keys",
	}}})
	s.waitStorage(t, id, "MOUNTED", 30*time.Second, func(st *cloudcodev1.StorageStatus) bool {
		return st.GetMountState() == cloudcodev1.StorageStatus_MOUNTED
	})
	oc := s.openCode(id)
	chat := oc.newChat(t)
	// The keys are put together inside, so that the command itself does not hold
	// them; what it finds first is what it put there itself.
	half := len(s.store.config.SecretAccessKey) / 2
	search := fmt.Sprintf(`python3 - <<'P'
import glob, os, stat
keys = [("%s" + "%s").encode(), ("%s" + "%s").encode()]
with open("/tmp/planted", "wb") as f: f.write(b"before " + keys[0])
def look(path):
    try:
        with open(path, "rb") as f: data = f.read()
    except OSError: return
    if any(k in data for k in keys): print(path)
for path in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline") + ["/proc/mounts"]: look(path)
for top, dirs, files in os.walk("/"):
    if top == "/": dirs[:] = [d for d in dirs if d not in ("proc", "sys")]
    for name in files:
        path = os.path.join(top, name)
        if stat.S_ISREG(os.lstat(path).st_mode): look(path)
P`, s.store.config.SecretAccessKey[:half], s.store.config.SecretAccessKey[half:], s.store.config.AccessKeyID[:3], s.store.config.AccessKeyID[3:])
	if out := s.a.exec(t, id, search); out != "/tmp/planted\n" {
		t.Errorf("keys are inside the container, not only where the search put one: %s", out)
	}
	oc.prompt(t, chat, "hello")

	// Arguments are for everybody on the machine to see.
	mounterSeen := false
	for _, h := range s.hosts {
		for _, p := range h.pids() {
			cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p))
			if strings.Contains(string(cmdline), s.store.config.SecretAccessKey) {
				t.Errorf("process %d has the key among its arguments: %q", p, cmdline)
			}
		}
		for _, p := range h.mounterPIDs(id) {
			env, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p))
			mounterSeen = mounterSeen || strings.Contains(string(env), s.store.config.SecretAccessKey)
		}
	}
	if !mounterSeen {
		t.Error("no mounter has the key in its environment: this looks at the wrong processes")
	}
	// Answers of the API, the command line, logs, and the bucket itself.
	code, body, err := s.call(bounded(t, 10*time.Second), "GET", s.url("/v1/sessions/"+id), nil)
	if err != nil || code != http.StatusOK || !strings.Contains(string(body), "own-keys") {
		t.Errorf("%d %s %v", code, body, err)
	}
	texts := map[string]string{"the API": string(body), "the command line": s.cli(t, "session", "get", id, "-o", "json")}
	list, err := s.sessions.ListSessions(bounded(t, 10*time.Second), &cloudcodev1.ListSessionsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	texts["the list"] = list.String()
	for _, p := range s.processes() {
		texts[p.name+"'s log"] = p.output()
	}
	s.suspend(t, id) // a manifest holds the session's record
	for key := range s.store.sizes(t, "own-keys/") {
		if strings.HasSuffix(key, "/head") || strings.Contains(key, "/manifests/") {
			texts[key] = string(s.store.get(t, key))
		}
	}
	if len(texts) < 8 {
		t.Errorf("only %d texts were searched", len(texts))
	}
	for what, text := range texts {
		if strings.Contains(text, s.store.config.SecretAccessKey) {
			t.Errorf("the key is in %s", what)
		}
	}
}

// TestOutage: while the object store cannot be reached, work goes on, and the
// session says since when it is not saved; afterwards it catches up.
func TestOutage(t *testing.T) {
	s := withStorage(t)
	id := s.session(t, "outage", spec(s.a, nil))
	oc := s.openCode(id)
	events := s.follow(t, id)
	chat := oc.newChat(t)
	oc.prompt(t, chat, "write before.txt before the outage")
	saved := oc.waitSaved(t, events, chat)

	cut := time.Now()
	s.store.proxy.Blackhole()
	defer s.store.proxy.Resume()
	if got := oc.prompt(t, chat, "write during.txt during the outage").text(); !strings.Contains(got, "DURING THE OUTAGE") {
		t.Errorf("during the outage a prompt is answered with %q", got)
	}
	st := s.waitStorage(t, id, "unsaved", time.Minute, func(st *cloudcodev1.StorageStatus) bool { return st.GetUnsavedSince() != nil })
	if since := st.GetUnsavedSince().AsTime(); since.Before(cut.Add(-10*time.Second)) || since.After(time.Now()) {
		t.Errorf("unsaved since %v; the outage began at %v", since, cut)
	}
	if st.GetMessage() == "" || st.GetCheckpoint().GetId() < saved.GetId() {
		t.Errorf("storage during the outage: %v", st)
	}
	if got := s.get(t, id); got.GetState() != cloudcodev1.Session_RUNNING {
		t.Errorf("during the outage the session is %v", got)
	}
	s.store.proxy.Cut() // what is not answered so far is refused from here on
	_, err := s.sessions.CheckpointSession(bounded(t, 2*time.Minute), &cloudcodev1.CheckpointSessionRequest{Name: "sessions/" + id})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("a checkpoint during the outage: %v", err)
	}
	s.store.proxy.Resume()
	back := time.Now()
	s.waitStorage(t, id, "saved again", time.Minute, func(st *cloudcodev1.StorageStatus) bool {
		return st.GetUnsavedSince() == nil && st.GetMessage() == "" && st.GetCheckpoint().GetCreateTime().AsTime().After(cut)
	})
	t.Logf("saved %v after the outage", time.Since(back).Round(time.Millisecond))
	oc.waitSaved(t, events, chat)

	// What was done meanwhile is in the bucket.
	s.a.die(t)
	s.a.forget(t, id)
	s.a.restart(t)
	s.waitSession(t, id, "restored", func(got *cloudcodev1.Session) bool {
		return got.GetState() == cloudcodev1.Session_RUNNING && s.a.volumeDir(id) != ""
	})
	eventually(t, 60*time.Second, "the file is back", func() string {
		out, stderr, err := s.a.tryExec(t, id, "cat during.txt")
		if err != nil || out != "during the outage" {
			return fmt.Sprint(out, stderr, err)
		}
		return ""
	})
	if list, err := oc.messages(bounded(t, 20*time.Second), chat); err != nil || !strings.Contains(list[len(list)-1].text(), "DURING THE OUTAGE") {
		t.Errorf("the chat: %+v %v", list, err)
	}
}

// TestCheckpoints: what people do with checkpoints, by command line and API.
func TestCheckpoints(t *testing.T) {
	t.Parallel()
	s := withStorage(t)
	id := s.session(t, "points", spec(s.a, nil))
	oc := s.openCode(id)
	events := s.follow(t, id)
	chat := oc.newChat(t)
	oc.prompt(t, chat, "write state.txt the first")
	first := oc.waitSaved(t, events, chat)
	oc.prompt(t, chat, "bash echo the second > state.txt; echo new > second.txt")
	oc.waitSaved(t, events, chat)
	read := func(id, file string) string {
		t.Helper()
		out, _, _ := s.hostOf(t, id).tryExec(t, id, "cat "+file+" 2>&1")
		return strings.TrimSpace(out)
	}
	messages := func(id string) int {
		t.Helper()
		list, err := s.openCode(id).messages(bounded(t, 20*time.Second), chat)
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	all := messages(id)

	t.Run("list", func(t *testing.T) {
		list := s.checkpoints(t, id)
		i := slices.IndexFunc(list, func(c *cloudcodev1.Checkpoint) bool { return c.GetId() == first.GetId() })
		if i < 1 {
			t.Fatalf("the first turn's checkpoint is number %d of %d", i, len(list))
		}
		for j := range list[1:] {
			if list[j].GetId() <= list[j+1].GetId() {
				t.Errorf("not newest first: %s before %s", list[j].GetId(), list[j+1].GetId())
			}
		}
		c := list[i]
		if c.GetFiles() == 0 || c.GetBytes() == 0 || c.GetNode() != "nodes/"+s.a.id || c.GetGeneration() != 1 || c.GetOpencodeVersion() == "" || c.GetTrigger() == "" {
			t.Errorf("the checkpoint is %v", c)
		}
		if out := s.cli(t, "session", "checkpoints", id); !strings.Contains(out, first.GetId()) {
			t.Errorf("session checkpoints lacks %s:\n%s", first.GetId(), out)
		}
	})

	t.Run("fork", func(t *testing.T) {
		began := time.Now()
		now, then := id+"-now", id+"-then"
		for fork, args := range map[string][]string{now: nil, then: {"--at", first.GetId()}} {
			t.Cleanup(func() { s.remove(t, fork) })
			s.cli(t, append([]string{"session", "fork", id, fork, "--wait"}, args...)...)
		}
		t.Logf("two forks in %v", time.Since(began).Round(time.Millisecond))
		if got := read(now, "state.txt second.txt"); got != "the second\nnew" || messages(now) != all {
			t.Errorf("the fork of now has %q and %d messages of %d", got, messages(now), all)
		}
		if got := read(then, "state.txt"); got != "the first" || messages(then) >= all {
			t.Errorf("the fork of then has %q and %d messages of %d", got, messages(then), all)
		}
		// They go their own ways.
		s.openCode(then).prompt(t, chat, "bash echo the fork > state.txt")
		s.openCode(now).prompt(t, chat, "bash echo the other fork > state.txt")
		if got := []string{read(id, "state.txt"), read(now, "state.txt"), read(then, "state.txt")}; !slices.Equal(got, []string{"the second", "the other fork", "the fork"}) {
			t.Errorf("origin and forks have %q", got)
		}
	})

	t.Run("restore", func(t *testing.T) {
		object := s.root + "/" + id + "/shared/kept.csv"
		s.store.put(t, object, []byte("1,2,3"))
		eventually(t, 90*time.Second, "the object is in the session's folder of the bucket", func() string {
			if out := read(id, "/root/s3/bucket/shared/kept.csv"); out != "1,2,3" {
				return out
			}
			return ""
		})
		s.cli(t, "session", "restore", id, "--at", first.GetId(), "--yes", "--wait")
		s.waitState(t, id, cloudcodev1.Session_RUNNING)
		if got := read(id, "state.txt"); got != "the first" || !strings.Contains(read(id, "second.txt"), "No such file") {
			t.Errorf("after the restore state.txt is %q, second.txt %q", got, read(id, "second.txt"))
		}
		if n := messages(id); n >= all || n == 0 {
			t.Errorf("after the restore the chat has %d messages of %d", n, all)
		}
		// And undone the same way: it was saved first.
		list := s.checkpoints(t, id)
		i := slices.IndexFunc(list, func(c *cloudcodev1.Checkpoint) bool { return c.GetGeneration() == 1 })
		if i < 0 {
			t.Fatalf("no checkpoint of before: %v", list)
		}
		before := s.get(t, id)
		if _, err := s.sessions.RestoreSession(bounded(t, time.Minute), &cloudcodev1.RestoreSessionRequest{Name: "sessions/" + id, Checkpoint: list[i].GetId()}); err != nil {
			t.Fatal(err)
		}
		s.waitSession(t, id, "restored again", func(got *cloudcodev1.Session) bool {
			return got.GetState() == cloudcodev1.Session_RUNNING && got.GetGeneration() > before.GetGeneration()
		})
		if got := read(id, "state.txt second.txt"); got != "the second\nnew" || messages(id) != all {
			t.Errorf("undone, state.txt and second.txt are %q, with %d messages of %d", got, messages(id), all)
		}
		if got := string(s.store.get(t, object)); got != "1,2,3" {
			t.Errorf("restores have changed the bucket's folder, which they must leave alone: %q", got)
		}
		_, err := s.sessions.RestoreSession(bounded(t, time.Minute), &cloudcodev1.RestoreSessionRequest{Name: "sessions/" + id, Checkpoint: "20200101t000000.000z-none"})
		if status.Code(err) != codes.NotFound {
			t.Errorf("to a checkpoint that does not exist: %v", err)
		}
	})

	t.Run("archives", func(t *testing.T) {
		dir := t.TempDir()
		s.a.exec(t, id, `mkdir -p tree/sub; echo in > tree/sub/file; ln -s sub/file tree/link; chmod 750 tree/sub/file; ln tree/sub/file tree/hard`)
		// Into and out of a running session.
		s.cli(t, "session", "cp", id+":tree", dir)
		if b, err := os.ReadFile(filepath.Join(dir, "tree", "link")); err != nil || string(b) != "in\n" {
			t.Errorf("copied out: %q %v", b, err)
		}
		if fi, err := os.Stat(filepath.Join(dir, "tree", "sub", "file")); err != nil || fi.Mode().Perm() != 0o750 {
			t.Errorf("copied out: %v %v", fi, err)
		}
		if err := os.WriteFile(filepath.Join(dir, "tree", "added"), []byte("from outside"), 0o755); err != nil {
			t.Fatal(err)
		}
		s.cli(t, "session", "cp", filepath.Join(dir, "tree"), id+":copy")
		if out := s.a.exec(t, id, "cd copy && cat added link && stat -c '%a %U' added sub/file"); out != "from outsidein\n755 root\n750 root\n" {
			t.Errorf("copied in: %q", out)
		}
		// All of it, as it is now and as it was.
		tarFile := filepath.Join(dir, "all.tar")
		s.cli(t, "session", "export", id, "-f", tarFile)
		names := mustRun(t, 20*time.Second, cleanEnv(), "tar", "-tf", tarFile)
		for _, want := range []string{"workspace/project/state.txt", "workspace/project/tree/link", ".opencode/data/opencode/opencode.db"} {
			if !strings.Contains(names, want+"\n") {
				t.Errorf("the export lacks %s:\n%.3000s", want, names)
			}
		}
		if strings.Contains(names, ".cloudcode") || strings.Contains(names, "bucket/") {
			t.Errorf("the export holds what is not the session's:\n%.3000s", names)
		}
		code, body, err := s.call(bounded(t, time.Minute), "GET", s.url("/v1/sessions/"+id+"/archive?path=state.txt&checkpoint="+first.GetId()), nil)
		if err != nil || code != http.StatusOK || !strings.Contains(string(body), "the first") {
			t.Errorf("state.txt of the first checkpoint: %d %q %v", code, body, err)
		}
		// Into a new session.
		other := id + "-other"
		t.Cleanup(func() { s.remove(t, other) })
		s.cli(t, "session", "import", other, "-f", tarFile, "--wait")
		s.waitState(t, other, cloudcodev1.Session_RUNNING)
		if got := read(other, "state.txt tree/link"); got != "the second\nin" {
			t.Errorf("imported: %q", got)
		}
		// A session that is on no machine is read from its newest checkpoint.
		s.suspend(t, id)
		code, body, err = s.call(bounded(t, time.Minute), "GET", s.url("/v1/sessions/"+id+"/archive?path=tree"), nil)
		if err != nil || code != http.StatusOK || !strings.Contains(string(body), "in\n") {
			t.Errorf("suspended: %d %.300q %v", code, body, err)
		}
		code, body, err = s.call(bounded(t, 20*time.Second), "GET", s.url("/v1/sessions/"+id+"/archive?path=no-such-file"), nil)
		if err != nil || code != http.StatusNotFound {
			t.Errorf("a path that is not there: %d %s %v", code, body, err)
		}
	})
}

// TestStorageInWords: what is wrong with object storage is found early and said.
func TestStorageInWords(t *testing.T) {
	s := withStorage(t)
	closed := "http://127.0.0.1:" + freePort(t)
	good := func(change func(*cloudcodev1.S3Storage)) *cloudcodev1.Storage {
		c := &cloudcodev1.S3Storage{
			Endpoint: s.store.config.Endpoint, Bucket: s.store.config.Bucket, AccessKeyId: s.store.config.AccessKeyID, SecretAccessKey: s.store.config.SecretAccessKey, PathStyle: true, Prefix: "words",
		}
		change(c)
		return &cloudcodev1.Storage{S3: c}
	}
	for name, c := range map[string]struct {
		storage *cloudcodev1.Storage
		code    []codes.Code
		say     []string
	}{
		"incomplete": {
			good(func(c *cloudcodev1.S3Storage) { c.Bucket, c.SecretAccessKey = "", "" }),
			[]codes.Code{codes.InvalidArgument},
			[]string{"bucket", "secret_access_key"},
		},
		"wrong keys": {
			good(func(c *cloudcodev1.S3Storage) { c.SecretAccessKey = "wrong" }),
			[]codes.Code{codes.FailedPrecondition, codes.InvalidArgument},
			[]string{"key"},
		},
		"no such bucket": {
			good(func(c *cloudcodev1.S3Storage) { c.Bucket = "no-such-bucket-here" }),
			[]codes.Code{codes.FailedPrecondition, codes.InvalidArgument},
			[]string{"no-such-bucket-here"},
		},
		"nothing listens": {
			good(func(c *cloudcodev1.S3Storage) { c.Endpoint = closed }),
			[]codes.Code{codes.Unavailable, codes.FailedPrecondition},
			[]string{strings.TrimPrefix(closed, "http://")},
		},
		"no address": {
			good(func(c *cloudcodev1.S3Storage) { c.Endpoint = "ftp://nowhere" }),
			[]codes.Code{codes.InvalidArgument},
			[]string{"endpoint"},
		},
		"no such profile": {&cloudcodev1.Storage{Profile: "nobody"}, []codes.Code{codes.InvalidArgument, codes.NotFound}, []string{"nobody"}},
		"prefix":          {&cloudcodev1.Storage{Prefix: proto.String("a/../b")}, []codes.Code{codes.InvalidArgument}, []string{"prefix"}},
		"hidden prefix":   {&cloudcodev1.Storage{Prefix: proto.String(".cloudcode/v1")}, []codes.Code{codes.InvalidArgument}, []string{"prefix"}},
	} {
		t.Run(name, func(t *testing.T) {
			id := idPrefix + "bad"
			_, err := s.sessions.CreateSession(bounded(t, 30*time.Second), &cloudcodev1.CreateSessionRequest{
				SessionId: id, Session: &cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{Storage: c.storage}},
			})
			if err == nil {
				s.remove(t, id)
			}
			if !slices.Contains(c.code, status.Code(err)) || reasonOf(err) == "" {
				t.Fatalf("%v", err)
			}
			for _, say := range c.say {
				if !strings.Contains(err.Error(), say) {
					t.Errorf("no word of %q: %v", say, err)
				}
			}
			if strings.Contains(err.Error(), s.store.config.SecretAccessKey) {
				t.Errorf("the answer holds the key: %v", err)
			}
		})
	}

	t.Run("one folder, one session", func(t *testing.T) {
		// Nowhere to go: the folder is taken from the create on.
		spec := func(prefix string) *cloudcodev1.SessionSpec {
			return &cloudcodev1.SessionSpec{NodeSelector: map[string]string{"no": "such-node"}, Storage: &cloudcodev1.Storage{Prefix: proto.String(prefix)}}
		}
		s.create(t, "folder-one", spec("team/one"))
		for _, prefix := range []string{"team/one", "team", "team/one/inside", ""} {
			_, err := s.sessions.CreateSession(bounded(t, 30*time.Second), &cloudcodev1.CreateSessionRequest{
				SessionId: idPrefix + "folder-two", Session: &cloudcodev1.Session{Spec: spec(prefix)},
			})
			if c := status.Code(err); c != codes.AlreadyExists && c != codes.FailedPrecondition || !strings.Contains(err.Error(), idPrefix+"folder-one") {
				t.Errorf("prefix %q: %v", prefix, err)
			}
			if err == nil {
				s.remove(t, idPrefix+"folder-two")
			}
		}
		s.create(t, "folder-three", spec("team/one-more")) // beside it, though its name begins the same
	})

	t.Run("server", func(t *testing.T) {
		dir := t.TempDir()
		for name, c := range map[string]struct{ env, say []string }{
			"incomplete":  {[]string{"S3_ENDPOINT=" + s.store.config.Endpoint, "S3_BUCKET=b"}, []string{"S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY"}},
			"path style":  {append(s.store.env(), "S3_PATH_STYLE=perhaps"), []string{"S3_PATH_STYLE", "perhaps"}},
			"wrong key":   {append(s.store.env(), "CLOUDCODE_ENCRYPTION_KEY=short"), []string{"CLOUDCODE_ENCRYPTION_KEY", "32"}},
			"no endpoint": {[]string{"S3_BUCKET=b"}, []string{"S3_ENDPOINT"}},
		} {
			p := newProcess(dir, strings.ReplaceAll(name, " ", "-"), c.env, "server", "--data-dir", filepath.Join(dir, name), "--grpc-listen", "127.0.0.1:0")
			p.start(t)
			select {
			case <-p.exited:
			case <-time.After(20 * time.Second):
				_ = p.stop()
				t.Errorf("%s: the server runs\n%s", name, p.tail(10))
				continue
			}
			for _, say := range c.say {
				if p.exitCode() == 0 || !strings.Contains(p.output(), say) {
					t.Errorf("%s: exit code %d, no word of %q:\n%s", name, p.exitCode(), say, p.tail(10))
				}
			}
		}
	})

	t.Run("local", func(t *testing.T) {
		s.create(t, "local", spec(s.a, &cloudcodev1.Storage{Mode: cloudcodev1.Storage_LOCAL}))
		id := idPrefix + "local"
		got := s.waitState(t, id, cloudcodev1.Session_RUNNING)
		if st := got.GetStorage(); st.GetMode() != cloudcodev1.Storage_LOCAL || st.GetPersistent() || st.GetUri() != "" {
			t.Errorf("storage: %v", st)
		}
		if out := s.cli(t, "session", "get", id); !strings.Contains(strings.ToLower(out), "not persistent") {
			t.Errorf("session get does not say that it is not persistent:\n%s", out)
		}
		ctx := bounded(t, 20*time.Second)
		_, err := s.sessions.CheckpointSession(ctx, &cloudcodev1.CheckpointSessionRequest{Name: got.GetName()})
		if status.Code(err) != codes.FailedPrecondition {
			t.Errorf("a checkpoint of it: %v", err)
		}
		_, err = s.sessions.ForkSession(ctx, &cloudcodev1.ForkSessionRequest{Name: got.GetName()})
		if status.Code(err) != codes.FailedPrecondition {
			t.Errorf("a fork of it: %v", err)
		}
		// It keeps its files on its machine over a suspend.
		s.openCode(id).prompt(t, s.openCode(id).newChat(t), "write kept.txt on the disk")
		if got := s.suspend(t, id); got.GetNode() != "nodes/"+s.a.id {
			t.Errorf("suspended, it is on %q", got.GetNode())
		}
		s.resume(t, id, s.a)
		if out := s.a.exec(t, id, "cat kept.txt"); out != "on the disk" {
			t.Errorf("kept.txt is %q", out)
		}
	})
}

// TestOriginalBucket: what the original project wrote is opened as it is, in the
// whole bucket, and gone on with.
func TestOriginalBucket(t *testing.T) {
	mounters(t)
	t.Parallel()
	s := withStorage(t)
	// The database is one that OpenCode wrote, on a local disk.
	writer := s.session(t, "writer", spec(s.a, &cloudcodev1.Storage{Mode: cloudcodev1.Storage_LOCAL}))
	chat := s.openCode(writer).newChat(t)
	s.openCode(writer).prompt(t, chat, "write from-the-original.txt written by the original")
	want := s.openCode(writer).rawMessages(t, chat)
	s.suspend(t, writer)
	bucket := s.store.newBucket(t, "original")
	volume := filepath.Join(s.a.volumeDir(writer), "data", "s3")
	files := 0
	err := filepath.WalkDir(volume, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.Contains(path, "node_modules") || strings.HasSuffix(path, "-shm") {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		key, err := filepath.Rel(volume, path)
		if err != nil {
			return err
		}
		bucket.put(t, key, data)
		files++
		return nil
	})
	if err != nil || files < 3 {
		t.Fatalf("%d files, %v", files, err)
	}
	before := bucket.sizes(t, "")

	s.create(t, "original", &cloudcodev1.SessionSpec{NodeSelector: on(s.b), Storage: &cloudcodev1.Storage{Prefix: proto.String(""), S3: &cloudcodev1.S3Storage{
		Endpoint: bucket.config.Endpoint, Bucket: bucket.config.Bucket, AccessKeyId: bucket.config.AccessKeyID, SecretAccessKey: bucket.config.SecretAccessKey, PathStyle: true,
	}}})
	id := idPrefix + "original"
	got := s.waitState(t, id, cloudcodev1.Session_RUNNING)
	if st := got.GetStorage(); st.GetMode() != cloudcodev1.Storage_MOUNT || st.GetMountState() != cloudcodev1.StorageStatus_MOUNTED {
		t.Errorf("AUTO for what the original wrote is %v", st)
	}
	if now := s.openCode(id).rawMessages(t, chat); now != want {
		t.Errorf("the chat is\n%.1000s\nand was\n%.1000s", now, want)
	}
	if out := s.b.exec(t, id, "cat from-the-original.txt"); out != "written by the original" {
		t.Errorf("the file is %q", out)
	}
	// Its folders inside are the bucket's, without what Cloud Code keeps.
	if out := s.b.exec(t, id, "ls -A /root/s3; ls -A /root/s3/.cloudcode 2>/dev/null | head -3"); strings.Contains(out, "v1") || !strings.Contains(out, "workspace") {
		t.Errorf("/root/s3 holds %q", out)
	}
	if a := s.openCode(id).prompt(t, chat, "write more.txt written now").text(); !strings.Contains(a, "WRITTEN NOW") {
		t.Errorf("the next prompt is answered with %q", a)
	}
	eventually(t, 30*time.Second, "the new file is beside the old ones", func() string {
		if string(bucket.get(t, "workspace/project/more.txt")) == "written now" {
			return ""
		}
		return "it is not"
	})
	now := bucket.sizes(t, "")
	for key := range before {
		if _, ok := now[key]; !ok {
			t.Errorf("object %s is gone", key)
		}
	}
	// And on another machine: the chat is in the checkpoint by now.
	s.suspend(t, id)
	s.resume(t, id, s.a)
	list, err := s.openCode(id).messages(bounded(t, 20*time.Second), chat)
	if err != nil || !strings.Contains(list[len(list)-1].text(), "WRITTEN NOW") {
		t.Errorf("on the other machine the chat is %+v %v", list, err)
	}
}

// TestRecover: a new fleet over an old bucket brings all sessions back, with
// nothing but the keys; and with an encryption key, nothing in the bucket can be read.
func TestRecover(t *testing.T) {
	t.Parallel()
	s := withStorage(t)
	const key = "CLOUDCODE_ENCRYPTION_KEY=AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
	marker := "marker-" + strings.Repeat(idPrefix, 3)
	old := newStorageFleet(t, "old", s.store, "recover", key)
	ended := false
	t.Cleanup(func() {
		if !ended {
			if err := old.end(); err != nil {
				t.Error(err)
			}
		}
	})
	ids := []string{idPrefix + "keep", idPrefix + "also", idPrefix + "deleted"}
	chats := map[string]string{}
	for i, id := range ids {
		_, err := old.sessions.CreateSession(bounded(t, 20*time.Second), &cloudcodev1.CreateSessionRequest{SessionId: id, Session: &cloudcodev1.Session{
			Labels: map[string]string{"number": fmt.Sprint(i)},
			Spec: &cloudcodev1.SessionSpec{
				NodeSelector: on(old.a), Env: map[string]string{"GREETING": "hello " + id}, OpencodeConfig: model(t).config(s.modelIP),
				Storage: &cloudcodev1.Storage{Mode: cloudcodev1.Storage_SNAPSHOT},
			},
		}})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range ids {
		old.waitState(t, id, cloudcodev1.Session_RUNNING)
		events := old.follow(t, id)
		oc := old.openCode(id)
		chats[id] = oc.newChat(t)
		oc.prompt(t, chats[id], "write secret.txt "+marker+id)
		oc.waitSaved(t, events, chats[id])
		events.close()
	}
	want := map[string]string{}
	for _, id := range ids {
		want[id] = old.openCode(id).rawMessages(t, chats[id])
	}
	if _, err := old.sessions.DeleteSession(bounded(t, 20*time.Second), &cloudcodev1.DeleteSessionRequest{Name: "sessions/" + ids[2]}); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the session is deleted", func() string {
		_, err := old.sessions.GetSession(context.Background(), &cloudcodev1.GetSessionRequest{Name: "sessions/" + ids[2]})
		if status.Code(err) != codes.NotFound {
			return fmt.Sprint(err)
		}
		return ""
	})

	t.Run("nothing can be read", func(t *testing.T) {
		found := func(prefix string) (objects int, names []string) {
			for k := range s.store.sizes(t, prefix) {
				objects++
				data := s.store.get(t, k)
				for _, plain := range []string{marker, "secret.txt", "workspace/project", "GREETING"} {
					if strings.Contains(string(data), plain) {
						names = append(names, k+": "+plain)
					}
				}
				// zstd would hide it from this search, and from nobody else.
				if strings.Contains(string(data), "\x28\xb5\x2f\xfd") {
					names = append(names, k+": zstd")
				}
			}
			return objects, names
		}
		if n, names := found("recover/.cloudcode/"); n < 6 || len(names) > 0 {
			t.Errorf("%d objects, in the clear: %q", n, names)
		}
		// The proof that the search finds something where there is no key.
		id := s.session(t, "clear", spec(s.a, nil))
		chat := s.openCode(id).newChat(t)
		events := s.follow(t, id)
		s.openCode(id).prompt(t, chat, "write secret.txt "+marker)
		s.openCode(id).waitSaved(t, events, chat)
		if n, names := found("fleet/.cloudcode/"); len(names) == 0 {
			t.Errorf("nothing is found in %d objects without encryption either", n)
		}
	})

	// The whole fleet is gone: server, gateway and both machines, with their disks.
	for _, h := range old.hosts {
		h.die(t)
	}
	old.server.kill(t)
	old.gateway.kill(t)
	ended = true
	if err := old.end(); err != nil {
		t.Error(err)
	}

	fresh := newStorageFleet(t, "fresh", s.store, "recover", key)
	fresh.endAfter(t)
	if list := fresh.cli(t, "session", "recover", "--dry-run"); !strings.Contains(list, ids[0]) || !strings.Contains(list, ids[1]) {
		t.Errorf("the bucket's sessions:\n%s", list)
	}
	if list := fresh.cli(t, "session", "list"); strings.Contains(list, ids[0]) {
		t.Errorf("a dry run made sessions:\n%s", list)
	}
	fresh.cli(t, "session", "recover")
	for _, id := range ids[:2] {
		t.Cleanup(func() { fresh.remove(t, id) })
	}
	for i, id := range ids[:2] {
		got := fresh.waitState(t, id, cloudcodev1.Session_RUNNING)
		if got.GetLabels()["number"] != fmt.Sprint(i) || got.GetSpec().GetEnv()["GREETING"] != "hello "+id {
			t.Errorf("recovered: %v", got)
		}
		if now := fresh.openCode(id).rawMessages(t, chats[id]); now != want[id] {
			t.Errorf("the chat of %s is\n%.1000s\nand was\n%.1000s", id, now, want[id])
		}
		h := fresh.hostOf(t, id)
		if out := h.exec(t, id, `cat secret.txt; echo " $GREETING"`); out != marker+id+" hello "+id+"\n" {
			t.Errorf("of %s: %q", id, out)
		}
	}
	list, err := fresh.sessions.ListSessions(bounded(t, 10*time.Second), &cloudcodev1.ListSessionsRequest{})
	if err != nil || len(list.GetSessions()) != 2 {
		t.Errorf("%d sessions: %v %v", len(list.GetSessions()), list, err)
	}
	// What was deleted with its storage kept comes back when it is asked for by name.
	t.Cleanup(func() { fresh.remove(t, ids[2]) })
	fresh.cli(t, "session", "recover", ids[2])
	fresh.waitState(t, ids[2], cloudcodev1.Session_RUNNING)
	if now := fresh.openCode(ids[2]).rawMessages(t, chats[ids[2]]); now != want[ids[2]] {
		t.Errorf("the chat of the deleted session is %.1000s", now)
	}
	// Another key reads nothing, and says so.
	t.Run("another key", func(t *testing.T) {
		other := newFleet(t, "otherkey")
		other.serverEnv = append(s.store.env(), "S3_PREFIX=recover", "CLOUDCODE_ENCRYPTION_KEY="+strings.Repeat("A", 43)+"=")
		other.endAfter(t)
		other.startServer(t)
		out, stderr, err := run(t, time.Minute, cleanEnv(), work.bin, "--data-dir", other.serverDir, "session", "recover")
		if text := out + stderr; err == nil || !strings.Contains(text, "key") {
			t.Errorf("recover with another key: %v\n%s", err, text)
		}
	})
}

// TestPurge: a deleted session leaves its storage, unless it is told otherwise;
// what a fork shares with it stays with the fork.
func TestPurge(t *testing.T) {
	t.Parallel()
	s := withStorage(t)
	id, fork := s.session(t, "purge", spec(s.a, nil)), idPrefix+"purge-fork"
	oc := s.openCode(id)
	events := s.follow(t, id)
	chat := oc.newChat(t)
	oc.prompt(t, chat, "bash head -c 3000000 /dev/urandom > shared.bin; sha256sum shared.bin")
	oc.waitSaved(t, events, chat)
	sum := s.a.exec(t, id, "sha256sum shared.bin")
	t.Cleanup(func() { s.remove(t, fork) })
	if _, err := s.sessions.ForkSession(bounded(t, time.Minute), &cloudcodev1.ForkSessionRequest{Name: "sessions/" + id, SessionId: fork}); err != nil {
		t.Fatal(err)
	}
	s.waitState(t, fork, cloudcodev1.Session_RUNNING)
	s.store.put(t, s.root+"/"+id+"/shared/data.csv", []byte("1,2,3"))
	if _, err := s.sessions.DeleteSession(bounded(t, time.Minute), &cloudcodev1.DeleteSessionRequest{Name: "sessions/" + id, PurgeStorage: true}); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the session is gone", func() string {
		_, err := s.sessions.GetSession(context.Background(), &cloudcodev1.GetSessionRequest{Name: "sessions/" + id})
		if status.Code(err) != codes.NotFound {
			return fmt.Sprint(err)
		}
		return ""
	})
	eventually(t, time.Minute, "its objects are gone", func() string {
		var left []string
		for k := range s.store.sizes(t, s.root+"/") {
			if strings.HasPrefix(k, s.root+"/"+id+"/") || strings.Contains(k, "/sessions/"+id+"/manifests/") { // its head stays, and fences
				left = append(left, k)
			}
		}
		return strings.Join(left, " ")
	})
	// The fork still restores.
	s.suspend(t, fork)
	s.resume(t, fork, s.b)
	if now := s.b.exec(t, fork, "sha256sum shared.bin"); now != sum {
		t.Errorf("the fork has %q, not %q", now, sum)
	}
}
