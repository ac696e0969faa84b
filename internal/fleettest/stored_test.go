package fleettest_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/fleettest"
	"github.com/cloudcode-dev/cloudcode/internal/s3test"
	"github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// stored is a fleet of two nodes with an object store, and a session that runs.
type stored struct {
	*testing.T
	f     *fleettest.Fleet
	nodes map[string]*fleettest.Node // by nodes/{id}
}

func newStored(t *testing.T) *stored {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
			t.Fatal("needs root: restored files belong to a container's users")
		}
		t.Skip("needs root: restored files belong to a container's users")
	}
	config := s3test.Start(t, s3test.Options{}).Bucket("sessions")
	profiles, err := storage.NewProfiles(&config, nil)
	if err != nil {
		t.Fatal(err)
	}
	s := &stored{T: t, f: fleettest.NewStored(t, profiles), nodes: map[string]*fleettest.Node{}}
	for _, id := range []string{"n1", "n2"} {
		s.nodes["nodes/"+id] = s.f.AddNode(id)
	}
	return s
}

func (s *stored) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// file is a file of a session on the node that it is on.
func (s *stored) file(sess *cloudcodev1.Session) string {
	s.Helper()
	dir := s.nodes[sess.GetNode()].Files(sess)
	if dir == "" {
		s.Fatalf("%s has no files of %s", sess.GetNode(), sess.GetName())
	}
	return filepath.Join(dir, "note")
}

func (s *stored) write(sess *cloudcodev1.Session, text string) {
	s.Helper()
	s.must(os.WriteFile(s.file(sess), []byte(text), 0o644))
}

func (s *stored) wantNote(sess *cloudcodev1.Session, want string) {
	s.Helper()
	got, err := os.ReadFile(s.file(sess))
	if err != nil || string(got) != want {
		s.Errorf("%s on %s has %q, %v, want %q", sess.GetName(), sess.GetNode(), got, err, want)
	}
}

func (s *stored) running(id string, generation int64) *cloudcodev1.Session {
	s.Helper()
	return s.f.Await(id, "running in that generation", func(sess *cloudcodev1.Session) bool {
		return sess.GetState() == cloudcodev1.Session_RUNNING && sess.GetGeneration() >= generation
	})
}

func TestSuspendAndGoOnElsewhere(t *testing.T) {
	s := newStored(t)
	s.f.Create("a", nil)
	a := s.running("a", 1)
	if !a.GetStorage().GetPersistent() {
		t.Fatalf("storage %v", a.GetStorage())
	}
	first := s.nodes[a.GetNode()]
	s.write(a, "written before")
	if _, err := s.f.Sessions.SuspendSession(t.Context(), &cloudcodev1.SuspendSessionRequest{Name: "sessions/a"}); err != nil {
		t.Fatal(err)
	}
	asleep := s.f.AwaitState("a", cloudcodev1.Session_SUSPENDED)
	if asleep.GetNode() != "" || asleep.GetStorage().GetCheckpoint().GetId() == "" || first.Files(a) != "" {
		t.Errorf("suspended: %v; files on its node: %q", asleep, first.Files(a))
	}
	// A suspended session is read from its newest checkpoint.
	stream, err := s.f.Sessions.ReadArchive(t.Context(), &cloudcodev1.ReadArchiveRequest{Name: "sessions/a", Path: "/root/s3/note"})
	s.must(err)
	var all bytes.Buffer
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		s.must(err)
		all.Write(part.GetData())
	}
	r := tar.NewReader(&all)
	h, err := r.Next()
	s.must(err)
	if text, err := io.ReadAll(r); err != nil || h.Name != "note" || string(text) != "written before" {
		t.Errorf("archive: %s with %q, %v", h.Name, text, err)
	}

	first.Stop()
	if _, err := s.f.Sessions.UpdateSession(t.Context(), &cloudcodev1.UpdateSessionRequest{Session: &cloudcodev1.Session{
		Name: "sessions/a", Spec: &cloudcodev1.SessionSpec{NodeSelector: map[string]string{"name": other(first.ID)}},
	}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.f.Sessions.ResumeSession(t.Context(), &cloudcodev1.ResumeSessionRequest{Name: "sessions/a"}); err != nil {
		t.Fatal(err)
	}
	b := s.running("a", 2)
	if b.GetNode() != "nodes/"+other(first.ID) {
		t.Errorf("resumed on %s", b.GetNode())
	}
	s.wantNote(b, "written before")
}

func other(id string) string {
	if id == "n1" {
		return "n2"
	}
	return "n1"
}

func TestRestoreForkAndRecover(t *testing.T) {
	s := newStored(t)
	s.f.Create("a", nil)
	a := s.running("a", 1)
	save := func() string {
		t.Helper()
		c, err := s.f.Sessions.CheckpointSession(t.Context(), &cloudcodev1.CheckpointSessionRequest{Name: "sessions/a"})
		s.must(err)
		return c.GetId()
	}
	s.write(a, "first")
	first := save()
	s.write(a, "second")
	second := save()
	if first == second {
		t.Fatal("nothing was saved")
	}
	if _, err := s.f.Sessions.RestoreSession(t.Context(), &cloudcodev1.RestoreSessionRequest{Name: "sessions/a", Checkpoint: first}); err != nil {
		t.Fatal(err)
	}
	a = s.running("a", 2)
	s.wantNote(a, "first")
	if _, err := s.f.Sessions.ForkSession(t.Context(), &cloudcodev1.ForkSessionRequest{Name: "sessions/a", Checkpoint: second, SessionId: "b"}); err != nil {
		t.Fatal(err)
	}
	b := s.running("b", 1)
	s.wantNote(b, "second")

	// Deleted, with its storage kept: it can be brought back.
	if _, err := s.f.Sessions.DeleteSession(t.Context(), &cloudcodev1.DeleteSessionRequest{Name: "sessions/a"}); err != nil {
		t.Fatal(err)
	}
	s.gone("a")
	storages := s.f.Storages
	list, err := storages.ListStoredSessions(t.Context(), &cloudcodev1.ListStoredSessionsRequest{Parent: "storageProfiles/default"})
	s.must(err)
	if n := len(list.GetSessions()); n != 2 || list.GetSessions()[0].GetDeleteTime() == nil || !list.GetSessions()[1].GetKnown() {
		t.Errorf("stored: %v", list)
	}
	got, err := storages.RecoverSessions(t.Context(), &cloudcodev1.RecoverSessionsRequest{Parent: "storageProfiles/default", SessionIds: []string{"a"}})
	s.must(err)
	if len(got.GetSessions()) != 1 || got.GetSessions()[0].GetUid() != a.GetUid() {
		t.Fatalf("recovered %v", got)
	}
	a = s.running("a", 3)
	s.wantNote(a, "first")

	// Deleted with its storage: nothing is left, and the fork goes on.
	if _, err := s.f.Sessions.DeleteSession(t.Context(), &cloudcodev1.DeleteSessionRequest{Name: "sessions/a", PurgeStorage: true}); err != nil {
		t.Fatal(err)
	}
	s.gone("a")
	list, err = storages.ListStoredSessions(t.Context(), &cloudcodev1.ListStoredSessionsRequest{Parent: "storageProfiles/default"})
	s.must(err)
	if len(list.GetSessions()) != 1 || list.GetSessions()[0].GetSessionId() != "b" {
		t.Errorf("after the purge: %v", list)
	}
}

func (s *stored) gone(id string) {
	s.Helper()
	s.f.AwaitGone(id)
}

// A user who says that a lost session's node is gone gets it elsewhere, as it was
// saved last; the node that was only cut off gives it up when it is back.
func TestLostGoesOnElsewhere(t *testing.T) {
	s := newStored(t)
	s.f.Create("a", nil)
	a := s.running("a", 1)
	s.write(a, "saved")
	if _, err := s.f.Sessions.CheckpointSession(t.Context(), &cloudcodev1.CheckpointSessionRequest{Name: "sessions/a"}); err != nil {
		t.Fatal(err)
	}
	old := s.nodes[a.GetNode()]
	old.Stop() // its containers go on
	s.f.AwaitState("a", cloudcodev1.Session_LOST)
	if _, err := s.f.Sessions.ResumeSession(t.Context(), &cloudcodev1.ResumeSessionRequest{Name: "sessions/a"}); err != nil {
		t.Fatal(err)
	}
	b := s.running("a", 2)
	if b.GetNode() == a.GetNode() || b.GetUid() != a.GetUid() {
		t.Fatalf("went on as %v", b)
	}
	s.wantNote(b, "saved")
	if !runs(t, old) {
		t.Fatal("the old container has ended by itself: this shows nothing")
	}
	old.Start()
	ctx, cancel := context.WithTimeout(t.Context(), fleettest.Wait)
	defer cancel()
	for runs(t, old) {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			t.Fatal("two containers of one session run")
		}
	}
	if again := s.running("a", 2); again.GetGeneration() != b.GetGeneration() || again.GetNode() != b.GetNode() {
		t.Errorf("after the old node returned: %v", again)
	}
}

// runs says whether a node has any container that runs.
func runs(t *testing.T, n *fleettest.Node) bool {
	t.Helper()
	all, err := n.Runtime.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(all, func(i runtime.Instance) bool { return i.State == runtime.StateRunning })
}
