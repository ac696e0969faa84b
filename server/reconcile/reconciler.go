package reconcile

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

const (
	retryFirst = 500 * time.Millisecond // after a failure, doubled each time …
	retryMax   = 30 * time.Second       // … up to this

	// A large fleet changes all the time, and each plan looks at all of it: after
	// one, the reconciler rests for a multiple of what it took.
	restRatio    = 4
	shortestRest = 5 * time.Millisecond // less is not worth waiting for
	longestRest  = time.Second

	parallel = 64 // transactions at a time: they share their writes to disk
)

// Reconciler keeps applying Plan to a store.
type Reconciler struct {
	store store.Store
	log   *slog.Logger
}

// New returns a Reconciler; Run starts it.
func New(s store.Store, log *slog.Logger) *Reconciler { return &Reconciler{store: s, log: log} }

// Run plans whenever something has changed, until ctx ends; returns nil then, and
// an error only when the store has been closed. A failed transaction is tried
// again with growing pauses.
func (r *Reconciler) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := newCache()
	watching := make(chan error, 1)
	go func() { watching <- r.follow(ctx, c) }()

	var retry *time.Timer
	var due <-chan time.Time // nil: nothing to try again
	pause := retryFirst
	var applied store.Revision
	for {
		select {
		case err := <-watching: // it ends with ctx or with the store
			if ctx.Err() != nil {
				return nil
			}
			return err
		case <-c.changed:
		case <-due:
			due = nil
		}
		snap, revision := c.snapshot()
		if revision < applied {
			continue // what we did ourselves is not in the cache yet, but will be
		}
		start := time.Now()
		plan := Plan(snap, start.UTC())
		rest := min(restRatio*time.Since(start), longestRest)
		newest, err := r.apply(ctx, plan)
		applied = max(applied, newest)
		if retry != nil {
			retry.Stop()
		}
		due = nil
		if err == nil {
			pause = retryFirst
			if rest > shortestRest {
				sleep(ctx, rest) // changes gather meanwhile
			}
			continue
		}
		if ctx.Err() == nil {
			r.log.ErrorContext(ctx, "cannot store what was decided; trying again", "error", err, "pause", pause)
		}
		retry = time.NewTimer(pause)
		due, pause = retry.C, min(2*pause, retryMax)
	}
}

// apply does all actions, and returns the newest revision and the first error.
// That a session has changed meanwhile is no error: its change leads to a new plan.
func (r *Reconciler) apply(ctx context.Context, actions []Action) (store.Revision, error) {
	var g errgroup.Group
	g.SetLimit(parallel)
	revisions := make([]store.Revision, len(actions))
	errs := make([]error, len(actions))
	for i, a := range actions {
		g.Go(func() error {
			revisions[i], errs[i] = r.Apply(ctx, a)
			if errors.Is(errs[i], fleet.ErrAborted) {
				errs[i] = nil
			}
			return nil
		})
	}
	_ = g.Wait() // the errors are in errs
	var newest store.Revision
	for _, rev := range revisions {
		newest = max(newest, rev)
	}
	for _, err := range errs {
		if err != nil {
			return newest, err
		}
	}
	return newest, nil
}

// Apply does one action in one transaction. Returns fleet.ErrAborted if the
// session has changed since the plan was made, or a node to place it on has.
func (r *Reconciler) Apply(ctx context.Context, a Action) (store.Revision, error) {
	// Made here and not in the transaction: that may run more than once.
	password := rand.Text()
	var after *fleet.Session
	rev, err := r.store.Update(ctx, func(tx store.Tx) error {
		s, err := tx.Session(a.Session)
		if errors.Is(err, fleet.ErrNotFound) || (err == nil && (s.UID != a.UID || s.Revision != a.Revision)) {
			return fmt.Errorf("%w: session %s has changed", fleet.ErrAborted, a.Session)
		} else if err != nil {
			return err
		}
		after = s
		return apply(tx, s, a, password)
	})
	if err != nil {
		return 0, fmt.Errorf("%s session %s: %w", a.Kind, a.Session, err)
	}
	r.log.InfoContext(ctx, "session "+string(a.Kind), "session", a.Session, "node", nodeOf(after),
		"generation", after.Generation, "state", after.State, "reason", after.Reason)
	return rev, nil
}

func nodeOf(s *fleet.Session) string {
	if s.Assignment == nil {
		return ""
	}
	return s.Assignment.Node
}

func apply(tx store.Tx, s *fleet.Session, a Action, password string) error {
	if a.Kind == Remove {
		return tx.DeleteSession(s.ID)
	}
	before := *s
	if a.State == fleet.StateLost && s.Assignment != nil {
		// The node may have come back since the plan was made, and have said how the
		// session is. It does not say so twice: LOST after that would stay.
		n, err := tx.Node(s.Assignment.Node)
		if err == nil && n.State == fleet.NodeReady {
			return fmt.Errorf("%w: node %s is ready again", fleet.ErrAborted, n.ID)
		} else if err != nil && !errors.Is(err, fleet.ErrNotFound) {
			return err
		}
	}
	if err := s.SetState(a.State, a.Reason, a.Message); err != nil {
		return err
	}
	switch a.Kind {
	case Place:
		n, err := tx.Node(a.Node)
		if err != nil && !errors.Is(err, fleet.ErrNotFound) {
			return err
		}
		if err != nil || n.State != fleet.NodeReady {
			return fmt.Errorf("%w: node %s is no longer ready", fleet.ErrAborted, a.Node)
		}
		s.Generation++
		s.Assignment = &fleet.Assignment{
			Node: a.Node, Generation: s.Generation, Spec: s.Spec.Clone(), Password: password,
			RestoreCheckpoint: s.RestoreCheckpoint, RestoreGeneration: s.RestoreGeneration,
		}
		s.Progress = &fleet.Progress{Phase: "placed", Detail: "on node " + a.Node}
		s.RestartCount = 0
	case Reassign:
		s.Generation++
		s.Assignment.Generation, s.Assignment.Spec = s.Generation, s.Spec.Clone()
		s.Assignment.Suspend = false
		s.Assignment.RestoreCheckpoint, s.Assignment.RestoreGeneration = s.RestoreCheckpoint, s.RestoreGeneration
		if s.State == fleet.StateStarting {
			s.Progress = &fleet.Progress{Phase: "placed", Detail: "on node " + s.Assignment.Node}
		}
		s.RestartCount = 0
	case AskDelete:
		s.Assignment.Delete = true
	case AskSuspend:
		s.Assignment.Suspend = true
	}
	s.UpdateTime = time.Now().UTC()
	if err := tx.PutSession(s); err != nil {
		return err
	}
	// A pending session's message names nodes, and they come and go: that alone is
	// nothing that watchers are told.
	if a.Kind == SetState && before.State == s.State && before.Reason == s.Reason {
		return nil
	}
	_, err := tx.AppendEvent(s)
	return err
}

// cache mirrors sessions and nodes, so that a plan does not read everything.
type cache struct {
	changed chan struct{} // holds one: something is to be planned

	mu       sync.Mutex
	revision store.Revision
	sessions map[string]*fleet.Session
	nodes    map[string]*fleet.Node
}

func newCache() *cache { return &cache{changed: make(chan struct{}, 1)} }

// follow keeps the cache up to date until ctx ends or the store is closed.
func (r *Reconciler) follow(ctx context.Context, c *cache) error {
	pause := retryFirst
	for ctx.Err() == nil {
		err := c.load(ctx, r.store)
		if err == nil {
			pause = retryFirst
			c.wake()
			err = c.watch(ctx, r.store)
		}
		switch {
		case ctx.Err() != nil || errors.Is(err, fleet.ErrUnavailable):
			return err
		case errors.Is(err, fleet.ErrStale):
			continue // fell behind: read everything again
		}
		r.log.ErrorContext(ctx, "cannot read the state; trying again", "error", err, "pause", pause)
		sleep(ctx, pause)
		pause = min(2*pause, retryMax)
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

func (c *cache) load(ctx context.Context, s store.Store) error {
	sessions, nodes := map[string]*fleet.Session{}, map[string]*fleet.Node{}
	var revision store.Revision
	err := s.View(ctx, func(tx store.ReadTx) error {
		revision = tx.Revision()
		for sess, err := range tx.Sessions("") {
			if err != nil {
				return err
			}
			sessions[sess.ID] = sess
		}
		for n, err := range tx.Nodes("") {
			if err != nil {
				return err
			}
			nodes[n.ID] = n
		}
		return nil
	})
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.revision, c.sessions, c.nodes = revision, sessions, nodes
	return nil
}

func (c *cache) watch(ctx context.Context, s store.Store) error {
	c.mu.Lock()
	after := c.revision
	c.mu.Unlock()
	for change, err := range s.Watch(ctx, after) {
		if err != nil {
			return err
		}
		c.take(change)
		c.wake()
	}
	return ctx.Err()
}

func (c *cache) take(change store.Change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case change.Kind == store.KindSession && change.Session != nil:
		c.sessions[change.ID] = change.Session
	case change.Kind == store.KindSession:
		delete(c.sessions, change.ID)
	case change.Kind == store.KindNode && change.Node != nil:
		c.nodes[change.ID] = change.Node
	case change.Kind == store.KindNode:
		delete(c.nodes, change.ID)
	}
	c.revision = change.Revision
}

func (c *cache) wake() {
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

func (c *cache) snapshot() (Snapshot, store.Revision) {
	c.mu.Lock()
	defer c.mu.Unlock()
	snap := Snapshot{Sessions: make([]*fleet.Session, 0, len(c.sessions)), Nodes: make([]*fleet.Node, 0, len(c.nodes))}
	for _, s := range c.sessions {
		snap.Sessions = append(snap.Sessions, s)
	}
	for _, n := range c.nodes {
		snap.Nodes = append(snap.Nodes, n)
	}
	return snap, c.revision
}
