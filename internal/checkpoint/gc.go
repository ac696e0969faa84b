package checkpoint

import (
	"context"
	"errors"
	"fmt"
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
}

// CollectGarbage deletes packs that no manifest of any session names and that are
// older than the grace, by the store's own clock. It deletes nothing if any manifest
// cannot be read.
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
	named := map[string]bool{}
	seen := map[string]bool{}
	for range 2 {
		if err := r.named(ctx, seen, named); err != nil {
			return st, fmt.Errorf("collect garbage: nothing was deleted: %w", err)
		}
	}
	st.Manifests = len(seen)
	var keys []string
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
	if o.DryRun || len(keys) == 0 {
		return st, nil
	}
	if err := r.store.Delete(ctx, keys...); err != nil {
		return st, fmt.Errorf("delete packs: %w", err)
	}
	return st, nil
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

// named adds the packs of all manifests that are not seen yet.
func (r *Repository) named(ctx context.Context, seen, named map[string]bool) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(fetchWorkers)
	var mu sync.Mutex
	var listErr error
	for o, err := range r.store.List(ctx, r.base+"sessions/", "", "") {
		if err != nil {
			listErr = fmt.Errorf("list manifests: %w", err)
			break
		}
		if !strings.Contains(o.Key, "/manifests/") || seen[o.Key] {
			continue
		}
		seen[o.Key] = true
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
				named[id.String()] = true
			}
			return nil
		})
	}
	return errors.Join(g.Wait(), listErr)
}
