package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/atomicfile"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

// record is what spec.json holds.
type record struct {
	Spec        runtime.Spec `json:"spec"`
	ImageDigest string       `json:"image_digest"`
	IP          string       `json:"ip"`
	StartedAt   time.Time    `json:"started_at"`
}

func sessionsDir(state string) string { return filepath.Join(state, "sessions") }
func netnsDir(state string) string    { return filepath.Join(state, "netns") }

func (r *Runtime) sessionDir(session string) string {
	return filepath.Join(sessionsDir(r.cfg.StateDir), session)
}

func (r *Runtime) netnsPath(session string) string {
	return filepath.Join(netnsDir(r.cfg.StateDir), session)
}

func (r *Runtime) saveRecord(rec record) error {
	dir := r.sessionDir(rec.Spec.Session)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	data, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(dir, "spec.json"), data, 0o600)
}

// loadRecord returns fs.ErrNotExist when the session has none that is whole.
func (r *Runtime) loadRecord(session string) (record, error) {
	var rec record
	data, err := os.ReadFile(filepath.Join(r.sessionDir(session), "spec.json"))
	if err != nil {
		return record{}, err
	}
	if err := json.Unmarshal(data, &rec); err != nil || rec.Spec.Session != session {
		return record{}, fmt.Errorf("record of session %s is damaged: %w", session, errors.Join(fs.ErrNotExist, err))
	}
	return rec, nil
}

func (r *Runtime) dropRecord(session string) error {
	return os.RemoveAll(r.sessionDir(session))
}

// keyedMutex is a mutex per key. Its zero value is ready.
type keyedMutex struct {
	mu sync.Mutex
	m  map[string]*keyedEntry
}

type keyedEntry struct {
	held chan struct{} // full while locked
	refs int
}

func (k *keyedMutex) entry(key string) *keyedEntry {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.m == nil {
		k.m = map[string]*keyedEntry{}
	}
	e := k.m[key]
	if e == nil {
		e = &keyedEntry{held: make(chan struct{}, 1)}
		k.m[key] = e
	}
	e.refs++
	return e
}

func (k *keyedMutex) release(key string, e *keyedEntry) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if e.refs--; e.refs == 0 {
		delete(k.m, key)
	}
}

// lock returns the function that unlocks, or ctx's error when that ends first.
func (k *keyedMutex) lock(ctx context.Context, key string) (unlock func(), err error) {
	e := k.entry(key)
	select {
	case e.held <- struct{}{}:
		return func() { <-e.held; k.release(key, e) }, nil
	case <-ctx.Done():
		k.release(key, e)
		return nil, ctx.Err()
	}
}

// tryLock returns nil when somebody else holds the lock.
func (k *keyedMutex) tryLock(key string) (unlock func()) {
	e := k.entry(key)
	select {
	case e.held <- struct{}{}:
		return func() { <-e.held; k.release(key, e) }
	default:
		k.release(key, e)
		return nil
	}
}

func containsAny(s string, subs ...string) bool {
	return slices.ContainsFunc(subs, func(sub string) bool { return strings.Contains(s, sub) })
}
