package dispatch

import (
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
)

// Bounds of one message; gRPC refuses more than 4 MiB.
const (
	chunkItems = 100
	chunkBytes = 256 << 10
)

// WatchAssignments implements nodev1.DispatchService. The stream ends with the
// registration.
func (d *Dispatcher) WatchAssignments(req *nodev1.WatchAssignmentsRequest, stream grpc.ServerStreamingServer[nodev1.WatchAssignmentsResponse]) error {
	ctx := stream.Context()
	id, err := d.node(ctx)
	if err != nil {
		return err
	}
	over, err := d.current(id, req.GetRegistrationId())
	if err != nil {
		return err
	}
	select {
	case <-d.mirror.loaded:
	case <-over:
		return expired(id)
	case <-ctx.Done():
		return ctx.Err()
	}
	gateways, moved := d.config.Gateways.Gateways()
	if err := sendGateways(stream, gateways); err != nil {
		return err
	}
	full, w := d.mirror.watch(id)
	defer d.mirror.unwatch(w)
	s := &assignmentStream{stream: stream, storage: d.config.Storage, sent: map[string]string{}}
	if err := s.snapshot(full); err != nil {
		return err
	}
	for {
		select {
		case <-w.wake:
			err = s.changes(d.mirror.take(w))
		case <-moved:
			gateways, moved = d.config.Gateways.Gateways()
			err = sendGateways(stream, gateways)
		case <-over:
			return expired(id)
		case <-ctx.Done():
			return ctx.Err()
		}
		if err != nil {
			return err
		}
	}
}

func sendGateways(stream grpc.ServerStreamingServer[nodev1.WatchAssignmentsResponse], list []*nodev1.Gateway) error {
	return stream.Send(&nodev1.WatchAssignmentsResponse{Update: &nodev1.WatchAssignmentsResponse_Gateways{
		Gateways: &nodev1.GatewayList{Gateways: list},
	}})
}

// assignmentStream knows what its node was told.
type assignmentStream struct {
	stream  grpc.ServerStreamingServer[nodev1.WatchAssignmentsResponse]
	storage Storage
	sent    map[string]string // session id to uid
}

func (s *assignmentStream) snapshot(full map[string]placed) error {
	all := make([]*nodev1.Assignment, 0, len(full))
	for _, p := range full {
		all = append(all, p.proto(s.storage))
	}
	return s.upsert(all, func(chunk []*nodev1.Assignment, last bool) *nodev1.WatchAssignmentsResponse {
		return &nodev1.WatchAssignmentsResponse{Update: &nodev1.WatchAssignmentsResponse_Snapshot{
			Snapshot: &nodev1.AssignmentChunk{Assignments: chunk, Last: last},
		}}
	})
}

func (s *assignmentStream) changes(changes map[string]placed) error {
	var upserts []*nodev1.Assignment
	var removes []string
	for id, p := range changes {
		uid, told := s.sent[id]
		// Of a session that was deleted and made again under its id, the node must
		// first hear that the old one is gone.
		if told && (p.session == nil || p.session.UID != uid) {
			removes = append(removes, id)
			delete(s.sent, id)
		}
		if p.session != nil {
			upserts = append(upserts, p.proto(s.storage))
		}
	}
	slices.Sort(removes)
	for chunk := range slices.Chunk(removes, chunkItems) {
		if err := s.stream.Send(&nodev1.WatchAssignmentsResponse{Update: &nodev1.WatchAssignmentsResponse_Changes{
			Changes: &nodev1.AssignmentChanges{Removes: chunk},
		}}); err != nil {
			return err
		}
	}
	if len(upserts) == 0 {
		return nil
	}
	return s.upsert(upserts, func(chunk []*nodev1.Assignment, _ bool) *nodev1.WatchAssignmentsResponse {
		return &nodev1.WatchAssignmentsResponse{Update: &nodev1.WatchAssignmentsResponse_Changes{
			Changes: &nodev1.AssignmentChanges{Upserts: chunk},
		}}
	})
}

// upsert sends assignments in chunks, at least one.
func (s *assignmentStream) upsert(all []*nodev1.Assignment, message func(chunk []*nodev1.Assignment, last bool) *nodev1.WatchAssignmentsResponse) error {
	slices.SortFunc(all, func(a, b *nodev1.Assignment) int { return strings.Compare(a.GetSessionId(), b.GetSessionId()) })
	for {
		n, size := 0, 0
		for n < len(all) && n < chunkItems {
			// One alone may be larger; a spec is far below what gRPC takes.
			if size += proto.Size(all[n]); size > chunkBytes && n > 0 {
				break
			}
			s.sent[all[n].GetSessionId()] = all[n].GetSessionUid()
			n++
		}
		if err := s.stream.Send(message(all[:n], n == len(all))); err != nil {
			return err
		}
		if all = all[n:]; len(all) == 0 {
			return nil
		}
	}
}
