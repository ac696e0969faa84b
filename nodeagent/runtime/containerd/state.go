package containerd

import (
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
	return writeFileAtomic(filepath.Join(dir, "spec.json"), data)
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

// writeFileAtomic leaves either the old or the new content after a crash.
func writeFileAtomic(path string, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	return err
}

// keyedMutex is a mutex per session. Its zero value is ready.
type keyedMutex struct {
	mu sync.Mutex
	m  map[string]*keyedEntry
}

type keyedEntry struct {
	sync.Mutex
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
		e = &keyedEntry{}
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

// lock returns the function that unlocks.
func (k *keyedMutex) lock(key string) func() {
	e := k.entry(key)
	e.Lock()
	return func() { e.Unlock(); k.release(key, e) }
}

// tryLock returns nil when somebody else holds the lock.
func (k *keyedMutex) tryLock(key string) func() {
	e := k.entry(key)
	if !e.TryLock() {
		k.release(key, e)
		return nil
	}
	return func() { e.Unlock(); k.release(key, e) }
}

func containsAny(s string, subs ...string) bool {
	return slices.ContainsFunc(subs, func(sub string) bool { return strings.Contains(s, sub) })
}
