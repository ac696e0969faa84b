package dispatch

import (
	"context"
	"errors"
	"iter"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

// chunkBytes bounds one message of the full set, far below gRPC's 4 MB.
const chunkBytes = 256 << 10

// WatchAssignments implements nodev1.DispatchServiceServer.
func (d *Dispatcher) WatchAssignments(req *nodev1.WatchAssignmentsRequest, stream grpc.ServerStreamingServer[nodev1.WatchAssignmentsResponse]) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	node, lease, err := d.current(ctx, req.GetRegistrationId())
	if err != nil {
		return err
	}
	revision, known, err := d.sendAll(ctx, node, stream)
	if err != nil {
		return err
	}

	// The store's feed is a blocking iterator; it gets a goroutine of its own,
	// which ends with ctx.
	type item struct {
		change store.Change
		err    error
	}
	feed := make(chan item)
	go func() {
		defer close(feed)
		for c, err := range d.cfg.Store.Watch(ctx, revision) {
			select {
			case feed <- item{c, err}:
			case <-ctx.Done():
				return
			}
		}
	}()
	gateways, changed := d.cfg.Gateways.Gateways()
	for sendGateways := true; ; {
		if sendGateways {
			if err := stream.Send(&nodev1.WatchAssignmentsResponse{Update: &nodev1.WatchAssignmentsResponse_Gateways{
				Gateways: &nodev1.GatewayList{Gateways: gateways},
			}}); err != nil {
				return err
			}
			sendGateways = false
		}
		select {
		case i, ok := <-feed:
			switch {
			case !ok:
				return ctx.Err()
			case errors.Is(i.err, fleet.ErrStale):
				return grpcerr.New(codes.Aborted, "TOO_SLOW", "this node fell behind: watch again")
			case i.err != nil:
				return i.err
			}
			if changes := delta(node, i.change, known); changes != nil {
				if err := stream.Send(&nodev1.WatchAssignmentsResponse{Update: &nodev1.WatchAssignmentsResponse_Changes{Changes: changes}}); err != nil {
					return err
				}
			}
		case <-changed:
			gateways, changed = d.cfg.Gateways.Gateways()
			sendGateways = true
		case <-lease.ended:
			return grpcerr.New(codes.FailedPrecondition, "REGISTRATION_EXPIRED", "node %s has registered again", node)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// sendAll sends the full set, and returns at which revision it was and what was sent.
func (d *Dispatcher) sendAll(ctx context.Context, node string, stream grpc.ServerStreamingServer[nodev1.WatchAssignmentsResponse]) (store.Revision, map[string]*nodev1.Assignment, error) {
	var revision store.Revision
	known := map[string]*nodev1.Assignment{}
	err := d.cfg.Store.View(ctx, func(tx store.ReadTx) error {
		revision = tx.Revision()
		for s, err := range tx.Sessions("") {
			if err != nil {
				return err
			}
			if a := assignment(node, s); a != nil {
				known[s.ID] = a
			}
		}
		return nil
	})
	if err != nil {
		return 0, nil, err
	}
	for chunk := range chunks(known) {
		if err := stream.Send(&nodev1.WatchAssignmentsResponse{Update: &nodev1.WatchAssignmentsResponse_Snapshot{Snapshot: chunk}}); err != nil {
			return 0, nil, err
		}
	}
	return revision, known, nil
}

// chunks yields at least one chunk; the last one says so.
func chunks(all map[string]*nodev1.Assignment) iter.Seq[*nodev1.AssignmentChunk] {
	return func(yield func(*nodev1.AssignmentChunk) bool) {
		chunk, size := &nodev1.AssignmentChunk{}, 0
		for _, a := range all {
			n := proto.Size(a)
			if size > 0 && size+n > chunkBytes {
				if !yield(chunk) {
					return
				}
				chunk, size = &nodev1.AssignmentChunk{}, 0
			}
			chunk.Assignments = append(chunk.Assignments, a)
			size += n
		}
		chunk.Last = true
		yield(chunk)
	}
}

// assignment of a session to a node; nil if it is not assigned to it.
func assignment(node string, s *fleet.Session) *nodev1.Assignment {
	a := s.Assignment
	if a == nil || a.Node != node {
		return nil
	}
	desired := nodev1.Assignment_RUN
	if a.Delete {
		desired = nodev1.Assignment_DELETE
	}
	return &nodev1.Assignment{
		SessionId: s.ID, SessionUid: s.UID, Generation: int64(a.Generation), DesiredState: desired,
		Spec: protoconv.Spec(a.Spec), OpencodePassword: a.Password,
	}
}

// delta is what a change means to a node that knows some assignments; nil if
// nothing. known is brought up to date.
func delta(node string, c store.Change, known map[string]*nodev1.Assignment) *nodev1.AssignmentChanges {
	if c.Kind != store.KindSession {
		return nil
	}
	var now *nodev1.Assignment
	if c.Session != nil {
		now = assignment(node, c.Session)
	}
	before := known[c.ID]
	switch {
	case now == nil && before == nil, now != nil && proto.Equal(now, before):
		return nil
	case now == nil:
		delete(known, c.ID)
		return &nodev1.AssignmentChanges{Removes: []string{c.ID}}
	default:
		known[c.ID] = now
		return &nodev1.AssignmentChanges{Upserts: []*nodev1.Assignment{now}}
	}
}
