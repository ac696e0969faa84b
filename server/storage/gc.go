package storage

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/checkpoint"
	conf "github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

const (
	gcEvery = 6 * time.Hour // of one root, by chance up to a tenth more
	gcBound = time.Hour     // one run takes at most that
	gcLook  = time.Minute   // how often it is asked which roots are due
)

// collector deletes data that no checkpoint needs, in all roots that are in use:
// those of profiles, and those that sessions bring.
type collector struct {
	s *Storage

	mu    sync.Mutex
	roots map[bucketKey]*root
}

type root struct {
	config conf.Config
	due    time.Time
	// purged: when that was done last. What it has left behind is old enough only
	// a grace later, when no session may know the root any more.
	purged time.Time
	// failed says why the last run deleted nothing.
	failed error
}

func newCollector(s *Storage) *collector { return &collector{s: s, roots: map[bucketKey]*root{}} }

// soon has a root looked at shortly: something was purged there.
func (g *collector) soon(c conf.Config) {
	g.mu.Lock()
	defer g.mu.Unlock()
	r := g.root(c)
	r.purged = time.Now()
	r.due = r.purged.Add(gcLook)
}

// root is made if it is not known. The first run is at a moment by chance: servers
// that are started again and again would otherwise never get to it, and those of one
// bucket would all do it at once. g.mu is held.
func (g *collector) root(c conf.Config) *root {
	r := g.roots[keyOf(c)]
	if r == nil {
		r = &root{config: c, due: time.Now().Add(rand.N(gcEvery))}
		g.roots[keyOf(c)] = r
	}
	return r
}

// run collects until ctx ends, one root at a time.
func (g *collector) run(ctx context.Context) {
	tick := time.NewTicker(gcLook)
	defer tick.Stop()
	for {
		if err := g.look(ctx); err != nil && ctx.Err() == nil {
			g.s.log.ErrorContext(ctx, "cannot read which object storage is in use", "error", err)
		}
		for _, c := range g.takeDue(time.Now()) {
			g.collect(ctx, c)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// look takes over which roots are in use.
func (g *collector) look(ctx context.Context) error {
	used := map[bucketKey]conf.Config{}
	for _, name := range g.s.config.Profiles.Names() {
		c, _ := g.s.config.Profiles.Get(name)
		used[keyOf(c)] = c
	}
	if err := g.s.config.Store.View(ctx, func(tx store.ReadTx) error {
		for sess, err := range tx.Sessions("") {
			if err != nil {
				return err
			}
			if o := sess.Spec.Storage.S3; o != nil {
				c := own(*o)
				used[keyOf(c)] = c
			}
		}
		return nil
	}); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range used {
		g.root(c)
	}
	for key, r := range g.roots {
		if _, ok := used[key]; !ok && time.Since(r.purged) > checkpoint.DefaultGrace+2*gcEvery {
			delete(g.roots, key)
		}
	}
	return nil
}

func (g *collector) takeDue(now time.Time) (due []conf.Config) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, r := range g.roots {
		if !r.due.After(now) {
			due = append(due, r.config)
			r.due = now.Add(gcEvery + rand.N(gcEvery/10))
		}
	}
	return due
}

func (g *collector) collect(ctx context.Context, c conf.Config) {
	if ctx.Err() != nil {
		return
	}
	b, err := g.s.openBucket(c)
	if err != nil {
		g.s.log.ErrorContext(ctx, "cannot collect garbage", "storage", c.String(), "error", err)
		return
	}
	bounded, cancel := context.WithTimeout(ctx, gcBound)
	defer cancel()
	start := time.Now()
	stats, err := b.repo.CollectGarbage(bounded, checkpoint.GCOptions{Grace: checkpoint.DefaultGrace})
	if ctx.Err() == nil {
		g.mu.Lock()
		g.root(c).failed = err
		g.mu.Unlock()
	}
	if err != nil {
		if ctx.Err() == nil {
			g.s.log.WarnContext(ctx, "cannot collect garbage; it is tried again later", "storage", c.String(), "error", err)
		}
		return
	}
	g.s.log.InfoContext(ctx, "garbage collected", "storage", c.String(), "took", time.Since(start), "stats", stats)
}

// Uncollected says why garbage could not be collected in a root the last time; nil: it
// could, or that was not tried yet.
func (s *Storage) Uncollected(c conf.Config) error {
	s.gc.mu.Lock()
	defer s.gc.mu.Unlock()
	if r := s.gc.roots[keyOf(c)]; r != nil && r.failed != nil {
		return words(c, r.failed)
	}
	return nil
}
