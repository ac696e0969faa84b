package storage

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cloudcode-dev/cloudcode/internal/checkpoint"
	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	conf "github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
	"github.com/cloudcode-dev/cloudcode/server/store/boltstore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// buckets are object stores in memory, by the bucket's name.
type buckets struct {
	mu     sync.Mutex
	all    map[string]*objstore.Memory
	checks int
	fail   error // of checks
	now    func() time.Time

	refusal func(op string) error
	wait    chan struct{}
}

func (b *buckets) get(name string) *objstore.Memory {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.all[name] == nil {
		b.all[name] = objstore.NewMemory()
		b.all[name].Fail = b.refuses
		b.all[name].Now = b.now
	}
	return b.all[name]
}

// refuse makes operations fail from now on; nil: none does.
func (b *buckets) refuse(fn func(op string) error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refusal = fn
}

func (b *buckets) refuses(op, _ string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.refusal == nil {
		return nil
	}
	return b.refusal(op)
}

func (b *buckets) open(c conf.Config) (objstore.Store, error) {
	prefix := c.Root
	if prefix != "" {
		prefix += "/"
	}
	return objstore.WithPrefix(b.get(c.Bucket), prefix), nil
}

func (b *buckets) check(ctx context.Context, _ conf.Config) (string, error) {
	b.mu.Lock()
	b.checks++
	fail, wait := b.fail, b.wait
	b.mu.Unlock()
	if wait != nil {
		select {
		case <-wait:
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
	return "found-1", fail
}

func profile(bucket, root string, change ...func(*conf.Config)) conf.Config {
	c := conf.Config{Endpoint: "https://s3.example.com", Bucket: bucket, AccessKeyID: "k", SecretAccessKey: "hunter2", Root: root}
	for _, f := range change {
		f(&c)
	}
	return c
}

// fixture is a Storage over a real store and buckets in memory.
type fixture struct {
	*testing.T
	*Storage
	buckets *buckets
	store   store.Store
}

func newFixture(t *testing.T, dir string, profiles map[string]conf.Config) *fixture {
	t.Helper()
	return newFixtureOver(t, dir, profiles, &buckets{all: map[string]*objstore.Memory{}})
}

func newFixtureOver(t *testing.T, dir string, profiles map[string]conf.Config, b *buckets) *fixture {
	t.Helper()
	db, err := boltstore.Open(filepath.Join(dir, "fleet.db"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := conf.NewProfiles(nil, profiles)
	if err != nil {
		t.Fatal(err)
	}
	s := New(Config{Store: db, Profiles: p, Logger: slog.New(slog.DiscardHandler), Open: b.open, Check: b.check})
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		_ = db.Close()
	})
	return &fixture{t, s, b, db}
}

// running has a Storage that runs, in a bubble of virtual time. Checkpoints are made
// before: what compresses them is kept in a pool, and must not stay in a bubble.
func running(t *testing.T, profiles map[string]conf.Config, prepare, fn func(f *fixture)) {
	t.Helper()
	start := time.Date(1999, 12, 31, 23, 0, 0, 0, time.UTC) // bubbles begin an hour later
	b := &buckets{all: map[string]*objstore.Memory{}, now: func() time.Time { return start }}
	prepare(newFixtureOver(t, t.TempDir(), profiles, b))
	for _, m := range b.all {
		m.Now = nil
	}
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		f := newFixtureOver(t, dir, profiles, b)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- f.Storage.Run(ctx) }()
		defer func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run: %v", err)
			}
		}()
		synctest.Wait()
		fn(f)
	})
}

func wait(d time.Duration) {
	time.Sleep(d) // in a bubble
	synctest.Wait()
}

func (f *fixture) put(sessions ...*fleet.Session) {
	f.Helper()
	if _, err := f.store.Update(f.Context(), func(tx store.Tx) error {
		for _, s := range sessions {
			if err := tx.PutSession(s); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		f.Fatal(err)
	}
}

func (f *fixture) get(id string) *fleet.Session {
	f.Helper()
	var s *fleet.Session
	if err := f.store.View(f.Context(), func(tx store.ReadTx) (err error) {
		s, err = tx.Session(id)
		return err
	}); err != nil {
		f.Fatal(err)
	}
	return s
}

// session that is kept in the default profile, in a folder of its name.
func session(id, bucket, root string) *fleet.Session {
	return &fleet.Session{
		ID: id, UID: "u-" + id, State: fleet.StatePending, Generation: 1, Labels: map[string]string{"team": "web"},
		Spec: fleet.Spec{Image: "i", Storage: fleet.Storage{
			Mode: fleet.ModeSnapshot, Profile: "default", Prefix: id, Endpoint: "https://s3.example.com", Bucket: bucket, Root: root,
		}},
	}
}

// save makes a checkpoint of a session as a node does, and releases its head.
func (f *fixture) save(s *fleet.Session, files map[string]string) string {
	f.Helper()
	st, err := f.Session(s.Spec.Storage)
	if err != nil {
		f.Fatal(err)
	}
	dir := f.TempDir()
	for name, text := range files {
		full := filepath.Join(dir, "tree", name)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			f.Fatal(err)
		}
		if err := os.WriteFile(full, []byte(text), 0o644); err != nil {
			f.Fatal(err)
		}
	}
	o := checkpoint.Owner{SessionID: s.ID, SessionUID: s.UID, Node: "n1", Instance: "i1", Generation: s.Generation}
	if _, _, err := st.inner.Acquire(f.Context(), o); err != nil {
		f.Fatal(err)
	}
	w, err := st.inner.NewWriter(f.Context(), checkpoint.WriterOptions{
		Dir: filepath.Join(dir, "tree"), IDBase: uint32(os.Getuid()), Owner: o, StateDir: filepath.Join(dir, "state"),
	})
	if err != nil {
		f.Fatal(err)
	}
	record, err := Record(s)
	if err != nil {
		f.Fatal(err)
	}
	info, err := w.Save(f.Context(), nil, checkpoint.Meta{Trigger: "manual", SessionJSON: record, Mode: string(s.Spec.Storage.Mode)})
	if err != nil {
		f.Fatal(err)
	}
	if err := w.Close(); err != nil {
		f.Fatal(err)
	}
	if err := st.inner.Release(f.Context(), o, false); err != nil {
		f.Fatal(err)
	}
	return info.ID
}

// take makes a node the owner of a session's head, as it does before it runs it.
func (f *fixture) take(s *fleet.Session, node string) {
	f.Helper()
	st, err := f.Session(s.Spec.Storage)
	if err != nil {
		f.Fatal(err)
	}
	o := checkpoint.Owner{SessionID: s.ID, SessionUID: s.UID, Node: node, Instance: node, Generation: s.Generation}
	if _, _, err := st.inner.Acquire(f.Context(), o); err != nil {
		f.Fatal(err)
	}
}

// objects are the keys of a bucket that begin with a prefix.
func (f *fixture) objects(bucket, prefix string) (keys []string) {
	for _, k := range f.buckets.get(bucket).Keys() {
		if strings.HasPrefix(k, prefix) {
			keys = append(keys, k)
		}
	}
	return keys
}

func wantErr(t *testing.T, what string, err error, code codes.Code, reason string, says ...string) {
	t.Helper()
	if status.Code(err) != code || grpcerr.Reason(err) != reason {
		t.Errorf("%s: %v with reason %q, want %s with %s", what, err, grpcerr.Reason(err), code, reason)
	}
	for _, text := range says {
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v does not say %q", what, err, text)
		}
	}
	if err != nil && strings.Contains(err.Error(), "hunter2") {
		t.Errorf("%s: a secret is in %v", what, err)
	}
}
