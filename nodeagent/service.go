package nodeagent

import (
	"context"
	"errors"
	"net"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	"github.com/cloudcode-dev/cloudcode/nodeagent/ring"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime/containerd/logger"
	"github.com/cloudcode-dev/cloudcode/nodeagent/worker"
	linkv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/link/v1"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// Bounds of one message of a stream.
const (
	eventBatch      = 256
	eventBatchBytes = 512 << 10
	logBatch        = 512
	logBatchBytes   = 512 << 10
)

// service is what the node offers over the link.
type service struct {
	nodev1.UnimplementedAgentServiceServer
	agent *Agent
}

func (s *service) WatchEvents(req *nodev1.WatchEventsRequest, stream grpc.ServerStreamingServer[nodev1.WatchEventsResponse]) error {
	ctx := stream.Context()
	w, ok := s.agent.worker(req.GetSessionId())
	// The events of a session that is being deleted are not for whoever asks now:
	// he may know the next session of this id already, which is on its way here.
	if !ok || w.Assignment().GetDesiredState() == nodev1.Assignment_DELETE {
		return grpcerr.New(codes.NotFound, "SESSION_NOT_HERE", "session %s is not on this node", req.GetSessionId())
	}
	events := w.Events()
	p := events.Position(req.GetAfter())
	position := func(p ring.Position) error {
		generation := w.Assignment().GetGeneration()
		if req.GetGeneration() > generation {
			generation = req.GetGeneration() // the assignment is still on its way here
		}
		return stream.Send(&nodev1.WatchEventsResponse{Update: &nodev1.WatchEventsResponse_Position{Position: &nodev1.RingPosition{
			First: p.First, Last: p.Last, Gap: p.Gap, Generation: generation,
		}}})
	}
	if err := position(p); err != nil {
		return err
	}
	// The stream ends with the session on this node.
	ctx, cancel := whileHere(ctx, w)
	defer cancel()
	for next := p.First; ; {
		batch, lost, err := events.Read(ctx, next, eventBatch)
		if err != nil {
			if stream.Context().Err() == nil {
				return grpcerr.New(codes.NotFound, "SESSION_NOT_HERE", "session %s is no longer on this node", req.GetSessionId())
			}
			return err
		}
		if lost {
			p := events.Position(0)
			if len(batch) > 0 {
				p.First = batch[0].Sequence
			}
			p.Gap = true
			next = p.First
			if err := position(p); err != nil {
				return err
			}
		}
		for len(batch) > 0 {
			msg, n := &nodev1.RingEvents{}, 0
			for size := 0; n < len(batch) && (n == 0 || size+len(batch[n].Frame) < eventBatchBytes); n++ {
				e := batch[n]
				size += len(e.Frame)
				msg.Events = append(msg.Events, &nodev1.RingEvent{
					Sequence: e.Sequence, Generation: e.Generation, Time: timestamppb.New(e.Time),
					Type: e.Type, Directory: e.Directory, Frame: e.Frame,
				})
			}
			next, batch = batch[n-1].Sequence+1, batch[n:]
			if err := stream.Send(&nodev1.WatchEventsResponse{Update: &nodev1.WatchEventsResponse_Events{Events: msg}}); err != nil {
				return err
			}
		}
	}
}

func (s *service) ReadLogs(req *nodev1.ReadLogsRequest, stream grpc.ServerStreamingServer[nodev1.ReadLogsResponse]) error {
	w, ok := s.agent.worker(req.GetSessionId())
	if !ok {
		return grpcerr.New(codes.NotFound, "SESSION_NOT_HERE", "session %s is not on this node", req.GetSessionId())
	}
	// Following ends with the session on this node: what comes later in this
	// folder is of another session.
	ctx, cancel := whileHere(stream.Context(), w)
	defer cancel()
	var batch []*cloudcodev1.LogEntry
	size := 0
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		err := stream.Send(&nodev1.ReadLogsResponse{Entries: batch})
		batch, size = nil, 0
		return err
	}
	options := logger.ReadOptions{Follow: req.GetFollow(), TailLines: int(req.GetTailLines())}
	for line, err := range logger.Read(ctx, s.agent.logDir(req.GetSessionId()), options) {
		if err != nil {
			return errors.Join(flush(), err)
		}
		// Programs write what they like, and long lines are cut between any two
		// bytes; what is no UTF-8 cannot be sent.
		text := strings.ToValidUTF8(line.Text, "\uFFFD")
		batch = append(batch, &cloudcodev1.LogEntry{Time: timestamppb.New(line.Time), Stream: line.Stream, Line: text})
		size += len(text)
		if len(batch) >= logBatch || size >= logBatchBytes || req.GetFollow() {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}

// whileHere returns a context that ends with the session on this node, too. The
// caller cancels it when it returns.
func whileHere(ctx context.Context, w *worker.Worker) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() { // ends with ctx
		select {
		case <-w.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// dialTarget is what the link asks for.
func (a *Agent) dialTarget(ctx context.Context, target *linkv1.Target) (net.Conn, error) {
	switch kind := target.GetKind().(type) {
	case *linkv1.Target_Agent:
		return a.local.DialContext(ctx)
	case *linkv1.Target_Session:
		t := kind.Session
		w, ok := a.worker(t.GetSessionId())
		if !ok {
			return nil, grpcerr.New(codes.NotFound, "SESSION_NOT_HERE", "session %s is not on this node", t.GetSessionId())
		}
		if t.GetPort() == 0 || t.GetPort() > 65535 {
			return nil, grpcerr.New(codes.InvalidArgument, "INVALID_PORT", "there is no port %d", t.GetPort())
		}
		dctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		conn, err := w.Dial(dctx, t.GetGeneration(), uint16(t.GetPort()))
		switch {
		case err == nil:
			return conn, nil
		case errors.Is(err, runtime.ErrStaleGeneration):
			return nil, grpcerr.New(codes.FailedPrecondition, "STALE_GENERATION", "%v", err)
		case errors.Is(err, runtime.ErrNotFound):
			return nil, grpcerr.New(codes.FailedPrecondition, "SESSION_NOT_RUNNING", "%v", err)
		case errors.Is(err, syscall.ECONNREFUSED):
			return nil, grpcerr.New(codes.Unavailable, "PORT_CLOSED", "nothing listens on port %d in session %s", t.GetPort(), t.GetSessionId())
		default:
			return nil, grpcerr.New(codes.Unavailable, "DIAL_FAILED", "port %d of session %s: %v", t.GetPort(), t.GetSessionId(), err)
		}
	default:
		return nil, grpcerr.New(codes.Unimplemented, "UNKNOWN_TARGET", "this node daemon does not know the target that was asked for: upgrade it")
	}
}
