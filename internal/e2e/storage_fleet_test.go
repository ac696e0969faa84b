//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// storageFleet is a fleet with object storage and two machines, a and b.
type storageFleet struct {
	*fleet
	store   *store
	root    string // of everything in the bucket
	mounter string // that its nodes use
	a, b    *nodeHost
}

// newStorageFleet starts a fleet over a bucket, or over part of one.
func newStorageFleet(tb testing.TB, name string, st *store, root string, env ...string) *storageFleet {
	tb.Helper()
	f := newFleet(tb, name)
	f.serverEnv = append(append(st.env(), "S3_PREFIX="+root, "CLOUDCODE_OWN_STORAGE=any"), env...)
	f.hosts = nil
	s := &storageFleet{fleet: f, store: st, root: root, a: f.addHost(tb, "a"), b: f.addHost(tb, "b")}
	f.nodeHost, f.modelIP = s.a, sharedAddress(tb)
	f.startServer(tb)
	f.startMembers(tb)
	f.waitReady(tb)
	for _, h := range f.hosts {
		h.importImage(tb)
	}
	return s
}

// sharedAddress is one of this machine that containers on all nodes reach. A
// bridge's is there once a container has been.
func sharedAddress(tb testing.TB) string {
	tb.Helper()
	name := bridgePrefix + "m"
	if i, err := net.InterfaceByName(name); err == nil {
		addrs, err := i.Addrs()
		if err != nil || len(addrs) == 0 {
			tb.Fatalf("addresses of %s: %v %v", name, addrs, err)
		}
		return addrs[0].(*net.IPNet).IP.String()
	}
	_, address := freeSubnet(tb)
	for _, args := range [][]string{{"link", "add", name, "type", "bridge"}, {"addr", "add", address + "/32", "dev", name}, {"link", "set", name, "up"}} {
		mustRun(tb, 10*time.Second, cleanEnv(), "ip", args...)
	}
	work.interfaces = append(work.interfaces, name)
	return address
}

// sharedStorage is the fleet of most tests of object storage.
var sharedStorage struct {
	once  sync.Once
	fleet *storageFleet
}

func withStorage(tb testing.TB) *storageFleet {
	tb.Helper()
	needReal(tb)
	sharedStorage.once.Do(func() {
		s := newStorageFleet(tb, "storage", startStore(tb), "fleet")
		// Ids of users on the host differ between the machines: b has given its
		// first range away, to a session that stays.
		first := idPrefix + "first-on-b"
		_, err := s.sessions.CreateSession(bounded(tb, 20*time.Second), &cloudcodev1.CreateSessionRequest{SessionId: first, Session: &cloudcodev1.Session{
			Spec: &cloudcodev1.SessionSpec{NodeSelector: on(s.b), Image: "localhost/e2e/missing:1", Storage: &cloudcodev1.Storage{Mode: cloudcodev1.Storage_LOCAL}},
		}})
		if err != nil {
			tb.Fatal(err)
		}
		s.waitState(tb, first, cloudcodev1.Session_FAILED)
		s.suspend(tb, first)
		for _, m := range []string{"rclone", "tigrisfs"} {
			if _, err := exec.LookPath(m); err == nil {
				s.mounter = m
			}
		}
		sharedStorage.fleet = s
	})
	s := sharedStorage.fleet
	if s == nil {
		tb.Fatal("the fleet with object storage did not start; see the first test that failed")
	}
	tb.Cleanup(func() {
		if tb.Failed() {
			for _, p := range s.processes() {
				tb.Log(p.tail(60))
			}
		}
	})
	return s
}

// storageWith is withStorage whose machines have this mounter and no other until
// the test has ended.
func storageWith(t *testing.T, mounter string) *storageFleet {
	t.Helper()
	s := withStorage(t)
	if s.mounter == mounter {
		return s
	}
	set := func(path, mounter string) {
		for _, h := range s.hosts {
			h.node.signal(t, syscall.SIGTERM, 20*time.Second)
			h.node.env = append(h.node.env, "PATH="+path)
			h.restart(t)
		}
		s.mounter = mounter
	}
	old := s.mounter
	set(pathWithout(t, old), mounter)
	t.Cleanup(func() { set(os.Getenv("PATH"), old) })
	return s
}

// pathWithout is a PATH that leads to all programs but one.
func pathWithout(t *testing.T, name string) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range filepath.SplitList(os.Getenv("PATH")) {
		list, _ := os.ReadDir(d)
		for _, e := range list {
			if e.Name() != name {
				_ = os.Symlink(filepath.Join(d, e.Name()), filepath.Join(dir, e.Name())) // the first one counts
			}
		}
	}
	return dir
}

// on is the selector of one machine.
func on(h *nodeHost) map[string]string { return map[string]string{"host": filepath.Base(h.nodeDir)} }

// move lets the session's next placement be on h.
func (f *fleet) move(tb testing.TB, id string, h *nodeHost) {
	tb.Helper()
	_, err := f.sessions.UpdateSession(bounded(tb, 20*time.Second), &cloudcodev1.UpdateSessionRequest{
		Session:    &cloudcodev1.Session{Name: "sessions/" + id, Spec: &cloudcodev1.SessionSpec{NodeSelector: on(h)}},
		UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"spec.node_selector"}},
	})
	if err != nil {
		tb.Fatalf("node selector of %s: %v", id, err)
	}
}

func (f *fleet) suspend(tb testing.TB, id string) *cloudcodev1.Session {
	tb.Helper()
	s, err := f.sessions.SuspendSession(bounded(tb, 20*time.Second), &cloudcodev1.SuspendSessionRequest{Name: "sessions/" + id})
	if err != nil {
		tb.Fatalf("suspend %s: %v", id, err)
	}
	if st := s.GetState(); st != cloudcodev1.Session_SUSPENDING && st != cloudcodev1.Session_SUSPENDED {
		tb.Errorf("suspend answers with state %v", st)
	}
	return f.waitState(tb, id, cloudcodev1.Session_SUSPENDED)
}

// resume starts the session on h and waits until it runs there.
func (f *fleet) resume(tb testing.TB, id string, h *nodeHost) *cloudcodev1.Session {
	tb.Helper()
	f.move(tb, id, h)
	if _, err := f.sessions.ResumeSession(bounded(tb, 20*time.Second), &cloudcodev1.ResumeSessionRequest{Name: "sessions/" + id}); err != nil {
		tb.Fatalf("resume %s: %v", id, err)
	}
	return f.waitSession(tb, id, "running on "+h.id, func(s *cloudcodev1.Session) bool {
		return s.GetState() == cloudcodev1.Session_RUNNING && s.GetNode() == "nodes/"+h.id
	})
}

func (f *fleet) checkpoints(tb testing.TB, id string) []*cloudcodev1.Checkpoint {
	tb.Helper()
	resp, err := f.sessions.ListCheckpoints(bounded(tb, 20*time.Second), &cloudcodev1.ListCheckpointsRequest{Parent: "sessions/" + id, PageSize: 1000})
	if err != nil {
		tb.Fatalf("checkpoints of %s: %v", id, err)
	}
	return resp.GetCheckpoints()
}

// checkpoint reads a `checkpointed` event.
func (e event) checkpoint() *cloudcodev1.Checkpoint {
	var c cloudcodev1.CheckpointedEvent
	if e.kind != "checkpointed" || protojson.Unmarshal([]byte(e.data), &c) != nil {
		return nil
	}
	return c.GetCheckpoint()
}

// turnEnd is when the chat's last answer was complete, by OpenCode's clock.
func (o *openCode) turnEnd(tb testing.TB, chat string) time.Time {
	tb.Helper()
	list, err := o.messages(bounded(tb, 20*time.Second), chat)
	if err != nil || len(list) == 0 {
		tb.Fatalf("messages of %s: %d, %v", chat, len(list), err)
	}
	ms := list[len(list)-1].Info.Time.Completed
	if ms == 0 {
		tb.Fatalf("the last message of %s is not complete", chat)
	}
	return time.UnixMilli(int64(ms))
}

// waitSaved returns the first checkpoint that a `checkpointed` event names and
// that holds the end of the chat's last turn.
func (o *openCode) waitSaved(tb testing.TB, w *watcher, chat string) *cloudcodev1.Checkpoint {
	tb.Helper()
	end := o.turnEnd(tb, chat)
	list := w.wait(tb, "checkpointed, after the turn", func(e event) bool {
		c := e.checkpoint()
		return c != nil && !c.GetCreateTime().AsTime().Before(end)
	})
	return list[len(list)-1].checkpoint()
}

// rawMessages is a chat as OpenCode shows it, to the byte.
func (o *openCode) rawMessages(tb testing.TB, chat string) string {
	tb.Helper()
	var raw json.RawMessage
	o.do(tb, "GET", "/session/"+chat+"/message", nil, &raw)
	return string(raw)
}

// volumeDir is the session's folder on the machine; "" if it has none.
func (h *nodeHost) volumeDir(session string) string {
	found, _ := filepath.Glob(filepath.Join(h.nodeDir, "node", "volumes", session+"-????????"))
	if len(found) == 0 {
		return ""
	}
	return found[0]
}

// waitNothingOf waits until the machine has nothing of the session.
func (h *nodeHost) waitNothingOf(tb testing.TB, session string) {
	tb.Helper()
	h.waitEnded(tb, session)
	eventually(tb, 45*time.Second, h.id+" has no files of "+session, func() string { return h.volumeDir(session) })
}

// waitEnded waits until nothing of the session runs or is mounted on the machine.
func (h *nodeHost) waitEnded(tb testing.TB, session string) {
	tb.Helper()
	eventually(tb, 45*time.Second, h.id+" runs nothing of "+session, func() string {
		if d := h.volumeDir(session); d != "" && len(mountsBelow(d)) > 0 {
			return fmt.Sprint(mountsBelow(d))
		}
		for _, p := range h.pids() {
			if cgroup, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p)); strings.Contains(string(cgroup), "/"+session+"\n") {
				return fmt.Sprintf("process %d", p)
			}
		}
		return ""
	})
}

// pids of everything that runs on the machine: the node daemon, containerd, its
// shims, mounters, and what is in containers.
func (h *nodeHost) pids() (list []int) {
	dirs, _ := os.ReadDir("/proc")
	parent := cgroupParent(h.runDir())
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join("/proc", d.Name(), "cmdline"))
		text := strings.ReplaceAll(string(cmdline), "\x00", " ") + " "
		cgroup, _ := os.ReadFile(filepath.Join("/proc", d.Name(), "cgroup"))
		if strings.Contains(text, h.nodeDir+"/") || strings.Contains(text, h.nodeDir+" ") || strings.Contains(text, h.runDir()) || strings.Contains(string(cgroup), parent+"/") {
			list = append(list, pid)
		}
	}
	return list
}

// die is the loss of the machine: SIGKILL for everything on it, within moments.
// It returns when that was. Mounts, bridge and disk are left behind.
func (h *nodeHost) die(tb testing.TB) time.Time {
	tb.Helper()
	kill := func() (left int) {
		for _, p := range h.pids() {
			if state(p) == "Z" {
				continue
			}
			_ = syscall.Kill(p, syscall.SIGKILL)
			left++
		}
		return left
	}
	kill()
	when := time.Now()
	eventually(tb, 20*time.Second, "everything on "+h.id+" ends", func() string {
		// What is frozen for a checkpoint dies only when it thaws; on a machine
		// without power it would not wait for that.
		h.thaw()
		if n := kill(); n > 0 {
			return fmt.Sprintf("%d processes", n)
		}
		return ""
	})
	<-h.node.exited
	h.died = true
	return when
}

// state is the letter that /proc shows for a process.
func state(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, after, _ := strings.Cut(string(b), ") ")
	letter, _, _ := strings.Cut(after, " ")
	return letter
}

func (h *nodeHost) thaw() {
	for file, word := range map[string]string{"freezer.state": "THAWED", "cgroup.freeze": "0"} {
		for _, pattern := range []string{"/sys/fs/cgroup/freezer", "/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
			found, _ := filepath.Glob(pattern + cgroupParent(h.runDir()) + "/*/" + file)
			for _, f := range found {
				_ = os.WriteFile(f, []byte(word), 0)
			}
		}
	}
}

// forget removes the session's folder from a machine whose daemon does not run:
// its disk is lost.
func (h *nodeHost) forget(tb testing.TB, session string) {
	tb.Helper()
	dir := h.volumeDir(session)
	if dir == "" {
		tb.Fatalf("%s has no folder of %s", h.id, session)
	}
	for _, m := range mountsBelow(dir) {
		if err := unix.Unmount(m, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			tb.Fatalf("unmount %s: %v", m, err)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		tb.Fatal(err)
	}
}

// mountsBelow lists mount points at and below dir, innermost first.
func mountsBelow(dir string) (list []string) {
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && (f[4] == dir || strings.HasPrefix(f[4], dir+"/")) {
			list = append(list, f[4])
		}
	}
	slices.Reverse(list)
	return list
}

// restart starts the node daemon again after it was killed, and waits for it.
func (h *nodeHost) restart(tb testing.TB) {
	tb.Helper()
	h.node.start(tb)
	h.waitNode(tb)
}

func (h *nodeHost) waitNode(tb testing.TB) {
	tb.Helper()
	eventually(tb, 45*time.Second, h.id+" is ready", func() string {
		if !h.node.running() {
			tb.Fatalf("%s has ended: %v\n%s", h.node.name, h.node.err, h.node.tail(40))
		}
		return h.nodeReady()
	})
}

// hostOf returns the machine that the session is on.
func (f *fleet) hostOf(tb testing.TB, id string) *nodeHost {
	tb.Helper()
	node := strings.TrimPrefix(f.get(tb, id).GetNode(), "nodes/")
	for _, h := range f.hosts {
		if h.id == node {
			return h
		}
	}
	tb.Fatalf("session %s is on %q", id, node)
	return nil
}

// mounterPIDs are the mounters of a session on this machine: processes that
// have its folder among their arguments.
func (h *nodeHost) mounterPIDs(session string) (list []int) {
	for _, p := range h.pids() {
		exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", p))
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p))
		if name := filepath.Base(exe); (strings.HasPrefix(name, "tigrisfs") || strings.HasPrefix(name, "rclone")) && strings.Contains(string(cmdline), session+"-") {
			list = append(list, p)
		}
	}
	return list
}

// waitStorage waits until the session's storage status pleases.
func (f *fleet) waitStorage(tb testing.TB, id, what string, most time.Duration, ok func(*cloudcodev1.StorageStatus) bool) *cloudcodev1.StorageStatus {
	tb.Helper()
	var got *cloudcodev1.StorageStatus
	eventually(tb, most, "storage of "+id+" is "+what, func() string {
		if got = f.get(tb, id).GetStorage(); ok(got) {
			return ""
		}
		return got.String()
	})
	return got
}

// within runs until ok, without failing the test.
func within(most time.Duration, ok func() bool) bool {
	ctx, cancel := context.WithTimeout(context.Background(), most)
	defer cancel()
	for !ok() {
		if ctx.Err() != nil {
			return false
		}
		pauseFor(ctx, 25*time.Millisecond)
	}
	return true
}
