package nodeagent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime/runtimetest"
	"github.com/cloudcode-dev/cloudcode/nodeagent/volume"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type folders struct{ dir string }

func (v folders) Exists(name string) (bool, error) {
	_, err := os.Stat(filepath.Join(v.dir, name))
	return err == nil, nil
}

func (v folders) Ensure(_ context.Context, name string, _ int64) (volume.Volume, error) {
	dir := filepath.Join(v.dir, name)
	return volume.Volume{Dir: dir, S3Dir: dir, IDBase: 0x10000000}, os.MkdirAll(dir, 0o755)
}

func (v folders) Remove(_ context.Context, name string) error {
	return os.RemoveAll(filepath.Join(v.dir, name))
}

type keepOpen struct{ *runtimetest.Fake }

func (keepOpen) Close() error { return nil }

// machine is a node without a server: tests say what is assigned.
type machine struct {
	t    *testing.T
	dir  string
	fake *runtimetest.Fake
	*Agent
}

// onMachine runs fn in virtual time, with a node daemon.
func onMachine(t *testing.T, fn func(t *testing.T, m *machine)) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		m := &machine{t: t, dir: dir, fake: runtimetest.NewFake("img")}
		m.fake.Handler = func(string, uint16) http.Handler { return http.HandlerFunc(openCode) }
		defer m.fake.Close()
		m.boot()
		defer m.halt()
		fn(t, m)
	})
}

func (m *machine) boot() {
	agent, err := New(Config{
		Dir: filepath.Join(m.dir, "node"), NodeID: "n1", Server: "127.0.0.1:1", Runtime: keepOpen{m.fake},
		Volumes: folders{filepath.Join(m.dir, "volumes")}, JoinToken: func() (string, error) { return "", errors.New("none") },
	})
	if err == nil {
		err = agent.Start(m.t.Context())
	}
	if err != nil {
		m.t.Fatal(err)
	}
	m.Agent = agent
}

func (m *machine) halt() {
	if err := m.Stop(context.Background()); err != nil {
		m.t.Error(err)
	}
}

// openCode answers what the worker asks.
func openCode(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/global/health" {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"healthy":true,"version":"test"}`)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	_, password, _ := r.BasicAuth()
	fmt.Fprintf(w, "data: {\"payload\":{\"type\":\"of %s\"}}\n\n", password)
	w.(http.Flusher).Flush()
	<-r.Context().Done()
}

func uidOf(n int) string { return fmt.Sprintf("%08d-0000-7000-8000-000000000000", n) }

// assigned is generation g of the n-th session with id s1.
func assigned(n int, g int64) *nodev1.Assignment {
	return &nodev1.Assignment{
		SessionId: "s1", SessionUid: uidOf(n), Generation: g, DesiredState: nodev1.Assignment_RUN,
		OpencodePassword: fmt.Sprint("session ", n), Spec: &cloudcodev1.SessionSpec{Image: "img"},
	}
}

// expect waits for the report that it runs.
func (m *machine) expectRunning(n int, g int64) {
	m.t.Helper()
	var last *nodev1.SessionStatus
	for range 200 {
		time.Sleep(50 * time.Millisecond) // virtual
		synctest.Wait()
		m.reports.mu.Lock()
		last = m.reports.pending["s1"]
		m.reports.mu.Unlock()
		if last.GetState() == nodev1.SessionStatus_RUNNING && last.GetSessionUid() == uidOf(n) && last.GetGeneration() == g {
			return
		}
	}
	m.t.Fatalf("reported is %v, want session %d running at generation %d; calls: %v", last, n, g, m.fake.Calls())
}

// expectEvents says whose events a listener gets.
func (m *machine) expectEvents(want ...string) {
	m.t.Helper()
	w, ok := m.worker("s1")
	if !ok {
		m.t.Fatal("no worker")
	}
	synctest.Wait()
	events, _, err := w.Events().Read(m.t.Context(), w.Events().Position(0).First, 100)
	if err != nil {
		m.t.Fatal(err)
	}
	var got []string
	for _, e := range events {
		got = append(got, e.Type)
	}
	if !slices.Equal(got, want) {
		m.t.Errorf("events %q, want %q", got, want)
	}
}

// A session that was deleted and made again begins at generation 1, whatever the
// earlier one had come to.
func TestSameIDAgain(t *testing.T) {
	t.Run("a full set replaces", func(t *testing.T) {
		onMachine(t, func(t *testing.T, m *machine) {
			m.applyAll([]*nodev1.Assignment{assigned(1, 5)})
			m.expectRunning(1, 5)
			m.applyAll([]*nodev1.Assignment{assigned(2, 1)})
			m.expectRunning(2, 1)
			m.expectEvents("of session 2")
		})
	})
	t.Run("removed and made at once", func(t *testing.T) {
		onMachine(t, func(t *testing.T, m *machine) {
			m.apply([]*nodev1.Assignment{assigned(1, 5)}, nil)
			m.expectRunning(1, 5)
			m.fake.FailNext("Stop", "s1", errors.New("stuck")) // the first worker takes its time
			m.apply(nil, []string{"s1"})
			m.apply([]*nodev1.Assignment{assigned(2, 1)}, nil)
			m.expectRunning(2, 1)
			m.expectEvents("of session 2")
		})
	})
	t.Run("the daemon was restarted", func(t *testing.T) {
		onMachine(t, func(t *testing.T, m *machine) {
			m.apply([]*nodev1.Assignment{assigned(1, 5)}, nil)
			m.expectRunning(1, 5)
			m.halt() // nothing was saved: all that is known is the container
			m.boot()
			m.applyAll([]*nodev1.Assignment{assigned(2, 1)})
			m.expectRunning(2, 1)
			m.expectEvents("of session 2")
		})
	})
	t.Run("the daemon stops meanwhile", func(t *testing.T) {
		onMachine(t, func(t *testing.T, m *machine) {
			m.apply([]*nodev1.Assignment{assigned(1, 5)}, nil)
			m.expectRunning(1, 5)
			for range 10 {
				m.fake.FailNext("Stop", "s1", errors.New("stuck"))
			}
			m.apply([]*nodev1.Assignment{assigned(2, 1)}, nil)
			synctest.Wait() // halt must end both workers
		})
	})
}

func TestStraysAreStoppedInTheEnd(t *testing.T) {
	onMachine(t, func(t *testing.T, m *machine) {
		m.apply([]*nodev1.Assignment{assigned(1, 1)}, nil)
		m.expectRunning(1, 1)
		m.halt()
		m.boot()
		m.fake.FailNext("Stop", "s1", errors.New("stuck"))
		m.applyAll(nil)
		time.Sleep(10 * time.Second) // virtual
		synctest.Wait()
		if left, _ := m.fake.List(t.Context()); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		if len(m.workers) != 0 {
			t.Errorf("workers left: %v", m.workers)
		}
	})
}

func TestAdoptionAfterRestart(t *testing.T) {
	onMachine(t, func(t *testing.T, m *machine) {
		m.apply([]*nodev1.Assignment{assigned(1, 3)}, nil)
		m.saveState()
		m.expectRunning(1, 3)
		before, _ := m.fake.List(t.Context())
		m.halt()
		m.boot()
		m.expectRunning(1, 3)
		m.applyAll([]*nodev1.Assignment{assigned(1, 4)})
		m.expectRunning(1, 4)
		if after, _ := m.fake.List(t.Context()); len(after) != 1 || after[0].PID != before[0].PID {
			t.Errorf("%v became %v", before, after)
		}
	})
}
