package nodeagent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/cloudcode-dev/cloudcode/internal/atomicfile"
	"github.com/cloudcode-dev/cloudcode/internal/container"
	"github.com/cloudcode-dev/cloudcode/internal/link"
	"github.com/cloudcode-dev/cloudcode/internal/pki"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
	"github.com/cloudcode-dev/cloudcode/nodeagent/worker"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
)

// statePath holds what was assigned last, as a sequence of two
// WatchAssignmentsResponse: the assignments and the gateways. It is a copy for
// the time that the server is away; the server's word replaces it.
func (a *Agent) statePath(name string) string { return filepath.Join(a.cfg.Dir, name+".binpb") }

const (
	stateAssignments = "assignments"
	stateGateways    = "gateways"
)

// adopt finds what runs, and gives it to workers as far as it is known what it is.
func (a *Agent) adopt(ctx context.Context) error {
	instances, err := a.runtime.List(ctx)
	if err != nil {
		return fmt.Errorf("list running containers: %w", err)
	}
	for _, i := range instances {
		a.adopted[i.Session] = i
	}
	var saved nodev1.AssignmentChunk
	if err := a.loadState(stateAssignments, &saved); err != nil {
		return err
	}
	for _, s := range saved.GetAssignments() {
		a.assigned[s.GetSessionId()] = s
	}
	a.tell(saved.GetAssignments(), nil)
	if len(instances) > 0 {
		a.log.Info("found containers of an earlier node daemon", "count", len(instances))
	}
	return nil
}

// applyAll makes assignments the full set.
func (a *Agent) applyAll(assignments []*nodev1.Assignment) {
	wanted := map[string]bool{}
	for _, s := range assignments {
		wanted[s.GetSessionId()] = true
	}
	a.mu.Lock()
	var removes []string
	for id := range a.workers {
		if !wanted[id] {
			removes = append(removes, id)
		}
	}
	for id := range a.adopted {
		if !wanted[id] {
			a.log.Warn("a container is here that is not assigned to this node: stopping it; its files stay", "session", id)
			delete(a.adopted, id)
			a.own(id, worker.Detach(a.workerCfg, id))
		}
	}
	a.mu.Unlock()
	a.apply(assignments, removes)
	a.dropMounts.Do(func() { a.wg.Go(a.dropOtherMounts) })
}

// dropOtherMounts ends mounts of sessions that went elsewhere while no daemon was
// here to be told.
func (a *Agent) dropOtherMounts() {
	assigned := func(volume string) bool { // as it is then: more may be mounted by now
		a.mu.Lock()
		defer a.mu.Unlock()
		for _, s := range a.assigned {
			if worker.VolumeName(s) == volume {
				return true
			}
		}
		return false
	}
	if err := a.workerCfg.Storage.DropOthers(a.ctx, assigned); err != nil {
		a.log.Warn("cannot end the mounts of sessions that are not this node's", "error", err)
	}
}

// own keeps a worker until it has ended. a.mu is held.
func (a *Agent) own(id string, w *worker.Worker) {
	a.workers[id] = w
	a.wg.Go(func() { a.forget(id, w) })
}

// apply writes down what is assigned, then starts and tells workers: in the other
// order, a daemon that is killed in between would find containers of a newer
// generation than it knows of. One goroutine calls it.
func (a *Agent) apply(upserts []*nodev1.Assignment, removes []string) {
	a.mu.Lock()
	upserts = slices.DeleteFunc(slices.Clone(upserts), func(s *nodev1.Assignment) bool {
		old := a.assigned[s.GetSessionId()]
		return old != nil && old.GetSessionUid() == s.GetSessionUid() && s.GetGeneration() < old.GetGeneration() // was on its way
	})
	for _, s := range upserts {
		a.assigned[s.GetSessionId()] = s
	}
	for _, id := range removes {
		delete(a.assigned, id)
	}
	a.mu.Unlock()
	a.saveState()
	a.tell(upserts, removes)
}

// tell starts and tells workers.
func (a *Agent) tell(upserts []*nodev1.Assignment, removes []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, s := range upserts {
		id := s.GetSessionId()
		before := a.workers[id]
		if before != nil {
			if before.Assign(s) {
				continue
			}
			before.Assign(nil) // of an earlier session of this id, if it has not ended
		}
		inst, found := a.adopted[id]
		delete(a.adopted, id)
		if found && inst.Spec.Env[container.EnvPassword] != s.GetOpencodePassword() {
			// A session keeps its password: this is an earlier session's container, and
			// its generation means nothing for the new one.
			before, found = worker.Detach(a.workerCfg, id), false
		}
		adopt := found && (inst.State == runtime.StateRunning || inst.State == runtime.StatePaused) && inst.Generation == uint64(s.GetGeneration())
		a.own(id, worker.Start(a.workerCfg, s, adopt, before))
	}
	for _, id := range removes {
		if w := a.workers[id]; w != nil {
			w.Assign(nil)
		}
	}
}

// forget drops a worker that has ended by itself.
func (a *Agent) forget(id string, w *worker.Worker) {
	select {
	case <-w.Done():
	case <-a.ctx.Done():
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.workers[id] == w {
		delete(a.workers, id)
	}
}

// setGateways keeps a link to each gateway, and to no other.
func (a *Agent) setGateways(member *pki.Member, gateways []*nodev1.Gateway) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for address, l := range a.gateways {
		if !slices.ContainsFunc(gateways, func(g *nodev1.Gateway) bool { return g.GetAddress() == address }) {
			l.cancel()
			delete(a.gateways, address)
		}
	}
	for _, g := range gateways {
		address := g.GetAddress()
		if a.gateways[address] != nil || a.ctx.Err() != nil {
			continue
		}
		conn, err := member.Dial(pki.RoleGateway, address)
		if err != nil {
			a.log.Error("cannot use a gateway's address", "gateway", g.GetId(), "address", address, "error", err)
			continue
		}
		ctx, cancel := context.WithCancel(a.ctx)
		a.gateways[address] = &gatewayLink{cancel: cancel, id: g.GetId()}
		a.wg.Go(func() {
			defer conn.Close()
			link.Keep(ctx, conn, a.dialTarget, a.log.With("gateway", g.GetId()), nil)
		})
	}
}

// restoreGateways links to the gateways that were known last, so that traffic
// flows although the server is away.
func (a *Agent) restoreGateways(member *pki.Member) {
	var saved nodev1.GatewayList
	if err := a.loadState(stateGateways, &saved); err != nil {
		a.log.Warn("cannot read the gateways known last", "error", err)
	}
	a.setGateways(member, saved.GetGateways())
}

// saveState writes what is assigned, for the next daemon.
func (a *Agent) saveState() {
	a.mu.Lock()
	chunk := &nodev1.AssignmentChunk{Last: true}
	for _, s := range a.assigned {
		chunk.Assignments = append(chunk.Assignments, s)
	}
	list := &nodev1.GatewayList{}
	for address, l := range a.gateways {
		list.Gateways = append(list.Gateways, &nodev1.Gateway{Id: l.id, Address: address})
	}
	a.mu.Unlock()
	slices.SortFunc(chunk.Assignments, func(x, y *nodev1.Assignment) int { return strings.Compare(x.GetSessionId(), y.GetSessionId()) })
	slices.SortFunc(list.Gateways, func(x, y *nodev1.Gateway) int { return strings.Compare(x.GetAddress(), y.GetAddress()) })
	for name, m := range map[string]proto.Message{stateAssignments: chunk, stateGateways: list} {
		data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err == nil && !a.saved.same(name, data) {
			err = atomicfile.Write(a.statePath(name), data, 0o600)
			a.saved.set(name, data, err)
		}
		if err != nil {
			// Not fatal: it is needed only if the daemon restarts while the server is away.
			a.log.Warn("cannot save what is assigned", "error", err)
		}
	}
}

func (a *Agent) loadState(name string, m proto.Message) error {
	data, err := os.ReadFile(a.statePath(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := proto.Unmarshal(data, m); err != nil {
		return fmt.Errorf("%s is damaged (%w): remove it; the server knows what it said", a.statePath(name), err)
	}
	return nil
}

// savedState remembers what is on disk, to write only what changed. One
// goroutine uses it.
type savedState map[string]string

func (s savedState) same(name string, data []byte) bool {
	old, ok := s[name]
	return ok && old == string(data)
}

func (s savedState) set(name string, data []byte, err error) {
	if err != nil {
		delete(s, name)
		return
	}
	s[name] = string(data)
}

// jitter spreads reconnecting nodes: between half of d and d.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }
