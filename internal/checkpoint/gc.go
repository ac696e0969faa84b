package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// GCOptions of CollectGarbage.
type GCOptions struct {
	// Grace is how old a pack must be that no checkpoint names: DefaultGrace if zero.
	// Writers must have the same.
	Grace  time.Duration
	DryRun bool // only count
}

// GCStats say what was found and done.
type GCStats struct {
	Manifests    int
	Packs        int   // all there are
	PackBytes    int64 // of all
	Unnamed      int   // in no manifest
	Deleted      int   // of these, old enough
	DeletedBytes int64
	Orphans      int // manifests without a head, deleted
	Purged       int // heads that were left of purged sessions, deleted
}

// leftAge is after how long what is left of a session goes: the head of one that was
// purged, when nobody who could be fenced by it comes any more; and manifests without a
// head, of a writer that was cut off. It is long, as a head may be missing because
// somebody has removed it: then they are all there is.
const leftAge = 30 * 24 * time.Hour

// CollectGarbage deletes packs that no manifest of any session names and that are
// older than the grace, by the store's own clock. It deletes nothing if any manifest
// cannot be read. What is left of sessions that are no more goes as well, much later:
// see leftAge.
//
// Why that is safe: a writer names packs that its head's manifest names, which is
// never removed, or that it uploaded less than half the grace ago. A copy is there
// before its source is looked at for a last time; as all manifests are listed twice,
// one of the two is seen. A new pack is younger than the grace.
func (r *Repository) CollectGarbage(ctx context.Context, o GCOptions) (GCStats, error) {
	if o.Grace == 0 {
		o.Grace = DefaultGrace
	}
	var st GCStats
	now, err := r.clock(ctx)
	if err != nil {
		return st, err
	}
	// Packs first: one that comes later is not looked at.
	type found struct {
		key string
		id  string
		n   int64
		old bool
	}
	var packs []found
	for obj, err := range r.store.List(ctx, r.packs(), "", "") {
		if err != nil {
			return st, fmt.Errorf("list packs: %w", err)
		}
		id := obj.Key[strings.LastIndexByte(obj.Key, '/')+1:]
		packs = append(packs, found{obj.Key, id, obj.Size, obj.LastModified.Before(now.Add(-o.Grace))})
		st.Packs++
		st.PackBytes += obj.Size
	}
	l := looked{seen: map[string]bool{}, named: map[string]bool{}}
	for range 2 {
		if err := r.look(ctx, &l, now.Add(-leftAge)); err != nil {
			return st, fmt.Errorf("collect garbage: nothing was deleted: %w", err)
		}
	}
	named := l.named
	st.Manifests, st.Orphans = len(l.seen), len(l.orphans)
	keys := slices.Clone(l.orphans) // before the packs that they name
	for _, p := range packs {
		if named[p.id] {
			continue
		}
		st.Unnamed++
		if p.old {
			st.Deleted++
			st.DeletedBytes += p.n
			keys = append(keys, p.key)
		}
	}
	if o.DryRun {
		return st, nil
	}
	if len(keys) > 0 {
		if err := r.store.Delete(ctx, keys...); err != nil {
			return st, fmt.Errorf("delete packs: %w", err)
		}
	}
	for _, prefix := range l.left {
		gone, err := r.Session(prefix).forget(ctx, now.Add(-leftAge))
		if err != nil {
			return st, fmt.Errorf("delete what is left of %q: %w", prefix, err)
		}
		if gone {
			st.Purged++
		}
	}
	return st, nil
}

// forget removes the head if it is of a session that was purged before then. No store
// removes an object on a condition, so it is read just before. Should a new session
// take it in that moment, its node finds that its head is missing, and takes it anew.
func (s *Session) forget(ctx context.Context, before time.Time) (bool, error) {
	h, err := s.Head(ctx)
	if err != nil || !h.Purged() || !h.written.Before(before) {
		// One that is damaged is for people.
		if errors.Is(err, ErrNotFound) || errors.Is(err, ErrDamaged) {
			err = nil
		}
		return false, err
	}
	return true, s.r.store.Delete(ctx, s.headKey())
}

// clock gives the store's time.
func (r *Repository) clock(ctx context.Context) (time.Time, error) {
	key := r.base + "clock"
	if _, err := r.store.Put(ctx, key, []byte("Written to read the time of this store.\n"), objstore.PutOptions{ContentType: "text/plain"}); err != nil {
		return time.Time{}, fmt.Errorf("write %s: %w", key, err)
	}
	o, err := r.store.Stat(ctx, key)
	if err != nil {
		return time.Time{}, fmt.Errorf("read %s: %w", key, err)
	}
	return o.LastModified, nil
}

// looked is what one garbage collection has seen of sessions.
type looked struct {
	seen  map[string]bool // manifests
	named map[string]bool // packs
	// As of the last look: old manifests without a head, and sessions that have
	// nothing but an old head.
	orphans, left []string
}

// look adds the packs of all manifests that are not seen yet. What is older than
// before may be what is left of a session.
func (r *Repository) look(ctx context.Context, l *looked, before time.Time) error {
	l.orphans, l.left = nil, nil
	var dir string     // of the session that the listing is at
	var head, old bool // whether that has one, and nothing else
	leave := func() {
		if old {
			l.left = append(l.left, unescape(strings.TrimSuffix(strings.TrimPrefix(dir, r.base+"sessions/"), "/")))
		}
		head, old = false, false
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(fetchWorkers)
	var mu sync.Mutex
	var listErr error
	for o, err := range r.store.List(ctx, r.base+"sessions/", "", "") {
		if err != nil {
			listErr = fmt.Errorf("list manifests: %w", err)
			break
		}
		// The head comes before the manifests.
		if !strings.HasPrefix(o.Key, dir) || dir == "" {
			leave()
			dir = r.sessionDir(o.Key)
		}
		if o.Key == dir+"head" {
			head, old = true, o.LastModified.Before(before)
		}
		if !strings.Contains(o.Key, "/manifests/") {
			continue
		}
		old = false
		if l.seen[o.Key] {
			continue
		}
		if !head && o.LastModified.Before(before) {
			l.orphans = append(l.orphans, o.Key)
			continue
		}
		l.seen[o.Key] = true
		g.Go(func() error {
			text, _, err := r.store.Get(ctx, o.Key)
			if errors.Is(err, objstore.ErrNotFound) {
				return nil // retention
			}
			if err != nil {
				return fmt.Errorf("read %s: %w", o.Key, err)
			}
			_, ids, _, err := manifestPacks(text)
			if err != nil {
				return fmt.Errorf("%s: %w", o.Key, err)
			}
			mu.Lock()
			defer mu.Unlock()
			for _, id := range ids {
				l.named[id.String()] = true
			}
			return nil
		})
	}
	leave()
	return errors.Join(g.Wait(), listErr)
}

// sessionDir is the part of a key below sessions/ that names the session.
func (r *Repository) sessionDir(key string) string {
	base := r.base + "sessions/"
	name, _, _ := strings.Cut(strings.TrimPrefix(key, base), "/")
	return base + name + "/"
}
