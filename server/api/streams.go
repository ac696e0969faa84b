package api

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

// WatchSessionEvents implements SessionService.
func (s *Sessions) WatchSessionEvents(req *cloudcodev1.WatchSessionEventsRequest, stream grpc.ServerStreamingServer[cloudcodev1.SessionEvent]) error {
	sess, err := s.get(stream.Context(), req.GetName())
	if err != nil {
		return err
	}
	if s.config.Events == nil {
		return fleet.ErrUnavailable
	}
	for event, err := range s.config.Events.Subscribe(stream.Context(), sess.ID, req.GetAfter()) {
		if err != nil {
			return err
		}
		if err := stream.Send(event); err != nil {
			return err
		}
	}
	return stream.Context().Err()
}

// ReadSessionLogs implements SessionService.
func (s *Sessions) ReadSessionLogs(req *cloudcodev1.ReadSessionLogsRequest, stream grpc.ServerStreamingServer[cloudcodev1.LogEntry]) error {
	ctx := stream.Context()
	if req.GetTailLines() < 0 {
		var v violations
		v.add("tail_lines", "must not be negative")
		return v.err()
	}
	sess, err := s.get(ctx, req.GetName())
	if err != nil {
		return err
	}
	if sess.Assignment == nil {
		return grpcerr.New(codes.FailedPrecondition, reasonNotPlaced, "session %q is on no node yet, so there are no logs: %s", sess.ID, sess.Message)
	}
	agent, node, err := s.agent(ctx, sess)
	if err != nil {
		return err
	}
	logs, err := agent.ReadLogs(ctx, &nodev1.ReadLogsRequest{SessionId: sess.ID, Follow: req.GetFollow(), TailLines: req.GetTailLines()})
	if err != nil {
		return logError(sess.ID, node, err)
	}
	for {
		resp, err := logs.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return logError(sess.ID, node, err)
		}
		for _, entry := range resp.GetEntries() {
			if err := stream.Send(entry); err != nil {
				return err
			}
		}
	}
}

// agent returns the node daemon that has a session, which is on a node.
func (s *Sessions) agent(ctx context.Context, sess *fleet.Session) (agent nodev1.AgentServiceClient, node string, err error) {
	node = sess.Assignment.Node
	if s.config.Agents == nil {
		return nil, node, fleet.ErrUnavailable
	}
	agent, err = s.config.Agents.Agent(ctx, node)
	return agent, node, err
}

// logError says what a node's error means to the user.
func logError(id, node string, err error) error {
	st := status.Convert(err)
	switch st.Code() {
	case codes.Canceled, codes.DeadlineExceeded:
		return st.Err()
	case codes.NotFound:
		return grpcerr.New(codes.FailedPrecondition, reasonNoLogs, "session %q has not been started on node %s yet, so there are no logs", id, node)
	case codes.Unavailable:
		return grpcerr.New(codes.Unavailable, reasonUnreachable, "node %s, which has the logs of session %q, cannot be reached: %s", node, id, st.Message())
	}
	return grpcerr.New(st.Code(), "NODE_ERROR", "node %s: %s", node, st.Message())
}
