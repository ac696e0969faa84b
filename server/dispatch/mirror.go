package dispatch

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"sync"
	"time"

	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

const mirrorRetry = time.Second // after the store could not be read

// mirror keeps what is assigned to each node, so that neither a node that
// connects nor a change costs a look at every session. A stream has a set of the
// sessions that have changed since it looked: however slow its node, it holds
// each session once.
type mirror struct {
	loaded chan struct{} // closed after the first load

	mu       sync.Mutex
	sessions map[string]placed            // by session id; only those that are on a node
	nodes    map[string]map[string]placed // the same by node
	watchers map[string]map[*watcher]bool // by node
}

// placed is what a node is told of a session; the session is shared, and read only.
type placed struct {
	session *fleet.Session
}

// same says whether a node has to be told nothing.
func (p placed) same(o placed) bool {
	if p.session == nil || o.session == nil {
		return p.session == o.session
	}
	a, b := p.session.Assignment, o.session.Assignment
	// The spec with its keys, the password and what is restored change with the
	// generation only; keys of a profile when the server starts.
	return p.session.UID == o.session.UID && a.Node == b.Node && a.Generation == b.Generation &&
		a.Delete == b.Delete && a.Suspend == b.Suspend && p.session.Purge == o.session.Purge && maps.Equal(p.session.Labels, o.session.Labels)
}

func (p placed) node() string {
	if p.session == nil {
		return ""
	}
	return p.session.Assignment.Node
}

// proto is what the node is told; keys are in it, and go nowhere else.
func (p placed) proto(storage Storage) *nodev1.Assignment {
	a := p.session.Assignment
	desired := nodev1.Assignment_RUN
	switch {
	case a.Delete:
		desired = nodev1.Assignment_DELETE
	case a.Suspend:
		desired = nodev1.Assignment_SUSPEND
	}
	out := &nodev1.Assignment{
		SessionId: p.session.ID, SessionUid: p.session.UID, Generation: int64(a.Generation),
		DesiredState: desired, Spec: protoconv.Spec(a.Spec), OpencodePassword: a.Password,
		// Where it was ready once, its workspace is: on this node, or else in its
		// object storage.
		HasWorkspace: !p.session.ReadyTime.IsZero(),
		Labels:       maps.Clone(p.session.Labels), PurgeStorage: p.session.Purge,
		RestoreCheckpoint: a.RestoreCheckpoint, RestoreGeneration: int64(a.RestoreGeneration),
	}
	if a.Spec.Storage.Remote() {
		out.Storage = storage.Assigned(a.Spec.Storage)
	}
	return out
}

// watcher is one stream's view of its node.
type watcher struct {
	node string
	wake chan struct{} // holds one

	dirty map[string]bool // ids of sessions that have changed; guarded by mirror.mu
}

func newMirror() *mirror {
	return &mirror{
		loaded: make(chan struct{}), sessions: map[string]placed{},
		nodes: map[string]map[string]placed{}, watchers: map[string]map[*watcher]bool{},
	}
}

// watch returns the node's full set and a watcher of what changes from there on.
func (m *mirror) watch(node string) (map[string]placed, *watcher) {
	m.mu.Lock()
	defer m.mu.Unlock()
	w := &watcher{node: node, wake: make(chan struct{}, 1), dirty: map[string]bool{}}
	if m.watchers[node] == nil {
		m.watchers[node] = map[*watcher]bool{}
	}
	m.watchers[node][w] = true
	full := make(map[string]placed, len(m.nodes[node]))
	for id, p := range m.nodes[node] {
		full[id] = p
	}
	return full, w
}

func (m *mirror) unwatch(w *watcher) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.watchers[w.node], w)
	if len(m.watchers[w.node]) == 0 {
		delete(m.watchers, w.node)
	}
}

// take returns what has changed: without a session where it is no longer the node's.
func (m *mirror) take(w *watcher) map[string]placed {
	m.mu.Lock()
	defer m.mu.Unlock()
	changes := make(map[string]placed, len(w.dirty))
	for id := range w.dirty {
		changes[id] = m.nodes[w.node][id]
	}
	clear(w.dirty)
	return changes
}

// follow keeps the mirror up to date until ctx ends or the store is closed.
func (m *mirror) follow(ctx context.Context, s store.Store, log *slog.Logger) error {
	for ctx.Err() == nil {
		revision, err := m.load(ctx, s)
		if err == nil {
			err = m.read(ctx, s, revision)
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, fleet.ErrUnavailable):
			return err
		case errors.Is(err, fleet.ErrStale): // fell behind: read everything again
			continue
		}
		log.ErrorContext(ctx, "cannot read what is assigned; trying again", "error", err)
		select {
		case <-time.After(mirrorRetry):
		case <-ctx.Done():
		}
	}
	return nil
}

func (m *mirror) load(ctx context.Context, s store.Store) (revision store.Revision, err error) {
	all := map[string]placed{}
	if err := s.View(ctx, func(tx store.ReadTx) error {
		revision = tx.Revision()
		for sess, err := range tx.Sessions("") {
			if err != nil {
				return err
			}
			if sess.Assignment != nil {
				all[sess.ID] = placed{sess}
			}
		}
		return nil
	}); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for id := range m.sessions {
		if _, ok := all[id]; !ok {
			m.set(id, placed{})
		}
	}
	for id, p := range all {
		m.set(id, p)
	}
	select {
	case <-m.loaded:
	default:
		close(m.loaded)
	}
	return revision, nil
}

func (m *mirror) read(ctx context.Context, s store.Store, after store.Revision) error {
	for change, err := range s.Watch(ctx, after) {
		if err != nil {
			return err
		}
		if change.Kind != store.KindSession {
			continue
		}
		var now placed
		if change.Session != nil && change.Session.Assignment != nil {
			now.session = change.Session
		}
		m.mu.Lock()
		m.set(change.ID, now)
		m.mu.Unlock()
	}
	return ctx.Err()
}

// set puts what is known of a session, and tells the nodes it concerns. m.mu is held.
func (m *mirror) set(id string, now placed) {
	was := m.sessions[id]
	if now.same(was) {
		return
	}
	if node := was.node(); node != "" {
		delete(m.nodes[node], id)
		if len(m.nodes[node]) == 0 {
			delete(m.nodes, node)
		}
		m.mark(node, id)
	}
	if now.session == nil {
		delete(m.sessions, id)
		return
	}
	m.sessions[id] = now
	node := now.node()
	if m.nodes[node] == nil {
		m.nodes[node] = map[string]placed{}
	}
	m.nodes[node][id] = now
	m.mark(node, id)
}

func (m *mirror) mark(node, id string) {
	for w := range m.watchers[node] {
		w.dirty[id] = true
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}
