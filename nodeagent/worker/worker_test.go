package worker_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/cloudcode-dev/cloudcode/nodeagent/checkpoint"
	"github.com/cloudcode-dev/cloudcode/nodeagent/ring"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime/runtimetest"
	"github.com/cloudcode-dev/cloudcode/nodeagent/volume"
	"github.com/cloudcode-dev/cloudcode/nodeagent/worker"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const uid = "0197f1b2-0000-7000-8000-000000000001"

// openCode answers like OpenCode does, as far as the worker asks.
type openCode struct {
	mu      sync.Mutex
	silent  bool          // health is never answered
	streams chan struct{} // closing it ends the open event streams
}

func (o *openCode) set(f func()) { o.mu.Lock(); defer o.mu.Unlock(); f() }

func (o *openCode) endStreams() {
	o.set(func() { close(o.streams); o.streams = make(chan struct{}) })
}

func (o *openCode) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	o.mu.Lock()
	silent, streams := o.silent, o.streams
	o.mu.Unlock()
	if user, password, _ := r.BasicAuth(); user != "opencode" || password != "secret" {
		http.Error(w, "who are you", http.StatusUnauthorized)
		return
	}
	switch r.URL.Path {
	case "/global/health":
		if silent {
			<-r.Context().Done()
			return
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"healthy":true,"version":"1.18.34"}`)
	case "/global/event":
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprint(w, "data: {\"payload\":{\"type\":\"server.connected\"}}\n\n")
		w.(http.Flusher).Flush()
		for {
			select {
			case <-time.After(10 * time.Second):
				fmt.Fprint(w, "data: {\"directory\":\"/d\",\"payload\":{\"type\":\"server.heartbeat\"}}\n\n")
				w.(http.Flusher).Flush()
			case <-streams:
				return
			case <-r.Context().Done():
				return
			}
		}
	default:
		fmt.Fprint(w, "<html>the web UI</html>")
	}
}

// volumes keeps each session's folder below a temporary one.
type volumes struct{ dir string }

func (v volumes) Exists(name string) (bool, error) {
	_, err := os.Stat(filepath.Join(v.dir, name))
	return err == nil, nil
}

func (v volumes) Ensure(_ context.Context, name string, _ int64) (volume.Volume, error) {
	dir := filepath.Join(v.dir, name)
	s3 := filepath.Join(dir, "s3")
	return volume.Volume{
		Session: name, Dir: dir, S3Dir: s3, IDBase: 0x10000000,
		MountDir: filepath.Join(dir, "mnt"), RootDir: filepath.Join(dir, "root"), StateDir: filepath.Join(dir, "state"),
	}, os.MkdirAll(s3, 0o755)
}

func (v volumes) Remove(_ context.Context, name string) error {
	return os.RemoveAll(filepath.Join(v.dir, name))
}

// fixture is one worker's surroundings.
type fixture struct {
	t       *testing.T
	fake    *runtimetest.Fake
	oc      *openCode
	volumes volumes
	worker  *worker.Worker
	storage *checkpoint.Manager

	mu      sync.Mutex
	reports []*nodev1.SessionStatus
}

func newFixture(t *testing.T) *fixture {
	f := &fixture{
		t: t, fake: runtimetest.NewFake("img"), oc: &openCode{streams: make(chan struct{})}, volumes: volumes{t.TempDir()},
	}
	f.fake.Handler = func(string, uint16) http.Handler { return f.oc }
	return f
}

func assignment(generation int64) *nodev1.Assignment {
	return &nodev1.Assignment{
		SessionId: "s1", SessionUid: uid, Generation: generation, DesiredState: nodev1.Assignment_RUN, OpencodePassword: "secret",
		Spec: &cloudcodev1.SessionSpec{Image: "img", Resources: &cloudcodev1.Resources{MemoryBytes: 512 << 20}},
	}
}

func (f *fixture) start(a *nodev1.Assignment, adopt bool) {
	f.worker = worker.Start(worker.Config{
		Runtime: f.fake, Volumes: f.volumes, Storage: f.storage,
		LogDir:     func(s string) string { return "/logs/" + s },
		RemoveLogs: func(string) error { return nil },
		Report: func(s *nodev1.SessionStatus) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.reports = append(f.reports, s)
		},
		Log: slog.New(slog.DiscardHandler),
	}, a, adopt, nil)
	f.t.Cleanup(func() {
		f.worker.Stop()
		f.fake.Close()
	})
}

func (f *fixture) last() *nodev1.SessionStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.reports) == 0 {
		return &nodev1.SessionStatus{}
	}
	return f.reports[len(f.reports)-1]
}

// settle lets d pass and everything come to rest.
func settle(d time.Duration) {
	time.Sleep(d) // virtual: inside a synctest bubble
	synctest.Wait()
}

// expect waits for a state, at most for d of virtual time.
func (f *fixture) expect(state nodev1.SessionStatus_State, reason string, d time.Duration) *nodev1.SessionStatus {
	f.t.Helper()
	for end := time.Now().Add(d); ; settle(50 * time.Millisecond) {
		synctest.Wait()
		s := f.last()
		if s.GetState() == state && s.GetReason() == reason {
			return s
		}
		if time.Now().After(end) {
			f.t.Fatalf("after %v the status is %v, want %v %q; calls: %v", d, s, state, reason, f.fake.Calls())
		}
	}
}

func TestStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.start(assignment(1), false)
		s := f.expect(nodev1.SessionStatus_RUNNING, "", 5*time.Second)
		if s.GetOpencodeVersion() != "1.18.34" || s.GetGeneration() != 1 || s.GetReadyTime() == nil || s.GetSessionUid() != uid {
			t.Errorf("status %v", s)
		}
		var phases []string
		for _, r := range f.reports {
			if p := r.GetProgress().GetPhase(); p != "" && !slices.Contains(phases, p) {
				phases = append(phases, p)
			}
		}
		if want := []string{"placed", "container", "opencode"}; !slices.Equal(phases, want) {
			t.Errorf("phases %v, want %v", phases, want)
		}
		instances, _ := f.fake.List(t.Context())
		spec := instances[0].Spec
		if spec.Env["OPENCODE_SERVER_PASSWORD"] != "secret" || spec.Mounts[0].Destination != "/root/s3" || spec.IDBase != 0x10000000 || spec.Resources.MemoryBytes != 512<<20 {
			t.Errorf("spec %+v", spec)
		}
		if _, err := f.worker.Dial(t.Context(), 0, 2633); !errors.Is(err, runtime.ErrStaleGeneration) {
			t.Errorf("Dial of an old generation = %v", err)
		}
		c, err := f.worker.Dial(t.Context(), 1, 2633)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	})
}

func TestRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.start(assignment(1), false)
		f.expect(nodev1.SessionStatus_RUNNING, "", 5*time.Second)
		began := time.Now()
		f.fake.Exit("s1", 3, false)
		s := f.expect(nodev1.SessionStatus_STARTING, worker.ReasonExited, 200*time.Millisecond)
		if !strings.Contains(s.GetMessage(), "code 3") || !strings.Contains(s.GetMessage(), "session logs") {
			t.Errorf("message %q", s.GetMessage())
		}
		if _, err := f.worker.Dial(t.Context(), 1, 2633); !errors.Is(err, runtime.ErrNotFound) {
			t.Errorf("Dial while nothing runs = %v", err)
		}
		s = f.expect(nodev1.SessionStatus_RUNNING, "", 5*time.Second)
		if s.GetRestartCount() != 1 {
			t.Errorf("restart count %d", s.GetRestartCount())
		}
		if d := time.Since(began); d < time.Second || d > 2*time.Second {
			t.Errorf("back after %v, want about 1 s", d)
		}
		// Again and again: FAILED in the end, with growing pauses, and still tried.
		for range 4 {
			f.fake.Exit("s1", 3, false)
			settle(100 * time.Millisecond)
			if f.last().GetState() == nodev1.SessionStatus_FAILED {
				break
			}
			f.expect(nodev1.SessionStatus_RUNNING, "", time.Minute)
		}
		f.expect(nodev1.SessionStatus_FAILED, worker.ReasonExited, time.Second)
		s = f.expect(nodev1.SessionStatus_RUNNING, "", 2*time.Minute)
		if s.GetRestartCount() != 5 {
			t.Errorf("restart count %d, want 5", s.GetRestartCount())
		}
		// Long enough without a failure, and the count of failures starts again.
		settle(11 * time.Minute)
		f.fake.Exit("s1", 3, false)
		f.expect(nodev1.SessionStatus_STARTING, worker.ReasonExited, time.Second)
	})
}

func TestOutOfMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.start(assignment(1), false)
		f.expect(nodev1.SessionStatus_RUNNING, "", 5*time.Second)
		f.fake.Exit("s1", 137, true)
		s := f.expect(nodev1.SessionStatus_STARTING, worker.ReasonOOMKilled, time.Second)
		if !strings.Contains(s.GetMessage(), "512MiB") || !strings.Contains(s.GetMessage(), "--memory") {
			t.Errorf("message %q does not say the limit and what to do", s.GetMessage())
		}
	})
}

func TestErrorsOfEnsure(t *testing.T) {
	for _, tt := range []struct {
		err    error
		state  nodev1.SessionStatus_State
		reason string
	}{
		{runtime.ErrImageNotFound, nodev1.SessionStatus_FAILED, worker.ReasonImageNotFound},
		{runtime.ErrInvalidSpec, nodev1.SessionStatus_FAILED, worker.ReasonInvalidSpec},
		{runtime.ErrNoSpace, nodev1.SessionStatus_FAILED, worker.ReasonDiskFull},
		{runtime.ErrImagePull, nodev1.SessionStatus_STARTING, worker.ReasonImagePull},
		{runtime.ErrUnavailable, nodev1.SessionStatus_STARTING, worker.ReasonRuntimeUnavailable},
		{errors.New("boom"), nodev1.SessionStatus_STARTING, worker.ReasonStartFailed},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture(t)
				f.fake.FailNext("Ensure", "s1", fmt.Errorf("what happened: %w", tt.err))
				f.start(assignment(1), false)
				s := f.expect(tt.state, tt.reason, time.Second)
				if !strings.Contains(s.GetMessage(), "what happened") || !strings.Contains(s.GetMessage(), "next in") {
					t.Errorf("message %q", s.GetMessage())
				}
				f.expect(nodev1.SessionStatus_RUNNING, "", time.Minute)
			})
		})
	}
}

func TestNeverReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.oc.silent = true
		f.start(assignment(1), false)
		f.expect(nodev1.SessionStatus_STARTING, worker.ReasonNotReady, 2*time.Minute)
		if !slices.Contains(f.fake.Calls(), "Kill s1") {
			t.Error("a container that never got ready was not stopped")
		}
		f.oc.set(func() { f.oc.silent = false })
		f.expect(nodev1.SessionStatus_RUNNING, "", time.Minute)
	})
}

func TestDelete(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.start(assignment(1), false)
		f.expect(nodev1.SessionStatus_RUNNING, "", 5*time.Second)
		f.fake.FailNext("Stop", "s1", errors.New("stuck"))
		a := assignment(1)
		a.DesiredState = nodev1.Assignment_DELETE
		f.worker.Assign(a)
		synctest.Wait()
		if s := f.last(); s.GetReason() != worker.ReasonDeleteFailed || !strings.Contains(s.GetMessage(), "stuck") {
			t.Errorf("status %v, want DELETE_FAILED", s)
		}
		f.expect(nodev1.SessionStatus_GONE, "", 5*time.Second)
		if left, _ := f.fake.List(t.Context()); len(left) != 0 {
			t.Errorf("containers left: %v", left)
		}
		if left, _ := os.ReadDir(f.volumes.dir); len(left) != 0 {
			t.Errorf("files left: %v", left)
		}
		f.worker.Assign(nil)
		<-f.worker.Done()
		if f.worker.Assign(assignment(2)) {
			t.Error("a worker that has ended took an assignment")
		}
	})
}

// A disk that was replaced is said, and nothing is made up for it.
func TestWorkspaceMissing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		a := assignment(1)
		a.HasWorkspace = true
		f.start(a, false)
		s := f.expect(nodev1.SessionStatus_FAILED, worker.ReasonWorkspaceMissing, time.Second)
		if !strings.Contains(s.GetMessage(), "delete the session") {
			t.Errorf("message %q", s.GetMessage())
		}
		if left, _ := os.ReadDir(f.volumes.dir); len(left) != 0 {
			t.Errorf("a workspace was made: %v", left)
		}
		if err := os.Mkdir(filepath.Join(f.volumes.dir, "s1-"+uid[:8]), 0o755); err != nil {
			t.Fatal(err)
		}
		f.expect(nodev1.SessionStatus_RUNNING, "", 2*time.Minute)
	})
}

func TestNoLongerOurs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.start(assignment(1), false)
		f.expect(nodev1.SessionStatus_RUNNING, "", 5*time.Second)
		f.worker.Assign(nil)
		<-f.worker.Done()
		if left, _ := f.fake.List(t.Context()); len(left) != 0 {
			t.Errorf("containers left: %v", left)
		}
		if left, _ := os.ReadDir(f.volumes.dir); len(left) != 1 {
			t.Errorf("the session's files are gone: %v", left)
		}
	})
}

func TestReassign(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.start(assignment(1), false)
		f.expect(nodev1.SessionStatus_RUNNING, "", 5*time.Second)
		ready := f.last().GetReadyTime()
		settle(time.Minute)
		f.mu.Lock()
		f.reports = nil
		f.mu.Unlock()
		next := assignment(2)
		next.Spec.Resources.MemoryBytes = 1 << 30
		f.worker.Assign(next)
		f.worker.Assign(assignment(1)) // late: has no effect
		s := f.expect(nodev1.SessionStatus_RUNNING, "", 5*time.Second)
		for s.GetGeneration() != 2 {
			settle(10 * time.Millisecond)
			s = f.last()
		}
		instances, _ := f.fake.List(t.Context())
		if len(instances) != 1 || instances[0].Generation != 2 || instances[0].PID != 1001 {
			t.Errorf("instances %+v: want the same process at generation 2", instances)
		}
		if len(f.reports) != 1 || !proto.Equal(s.GetReadyTime(), ready) {
			t.Errorf("new limits, which interrupt nothing, were reported as %v", f.reports)
		}
		if _, err := f.worker.Dial(t.Context(), 1, 2633); !errors.Is(err, runtime.ErrStaleGeneration) {
			t.Errorf("Dial of the old generation = %v", err)
		}
		// Another environment needs another container, and that is said.
		other := assignment(3)
		other.Spec.Env = map[string]string{"A": "b"}
		f.worker.Assign(other)
		settle(time.Second)
		if s := f.expect(nodev1.SessionStatus_RUNNING, "", 5*time.Second); s.GetGeneration() != 3 || proto.Equal(s.GetReadyTime(), ready) {
			t.Errorf("status %v", s)
		}
		if first := f.reports[1]; first.GetState() != nodev1.SessionStatus_STARTING || first.GetGeneration() != 3 {
			t.Errorf("a new container was reported as %v", f.reports[1:])
		}
	})
}

func TestAdoption(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.start(assignment(1), false)
		f.expect(nodev1.SessionStatus_RUNNING, "", 5*time.Second)
		f.worker.Stop() // the daemon ends; the container does not
		f.mu.Lock()
		f.reports = nil
		f.mu.Unlock()
		f.start(assignment(1), true)
		s := f.expect(nodev1.SessionStatus_RUNNING, "", 5*time.Second)
		if len(f.reports) != 1 {
			t.Errorf("an adopted session was reported as %v", f.reports)
		}
		instances, _ := f.fake.List(t.Context())
		if !s.GetReadyTime().AsTime().Equal(instances[0].StartedAt) {
			t.Errorf("ready since %v, want since %v", s.GetReadyTime().AsTime(), instances[0].StartedAt)
		}
	})
}

func TestEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.start(assignment(1), false)
		f.expect(nodev1.SessionStatus_RUNNING, "", 5*time.Second)
		settle(25 * time.Second)
		types := func() (types []string) {
			p := f.worker.Events().Position(0)
			if p.Last < p.First {
				return nil
			}
			events, _, err := f.worker.Events().Read(t.Context(), p.First, 100)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range events {
				types = append(types, e.Type)
			}
			return types
		}
		if got, want := types(), []string{"server.connected", "server.heartbeat", "server.heartbeat"}; !slices.Equal(got, want) {
			t.Fatalf("events %v, want %v", got, want)
		}
		f.oc.endStreams()
		settle(time.Second)
		if got, want := types()[3:], []string{ring.TypeGap, "server.connected"}; !slices.Equal(got, want) {
			t.Fatalf("after the stream broke: events %v, want %v", got, want)
		}
	})
}
