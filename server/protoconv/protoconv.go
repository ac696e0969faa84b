// Package protoconv turns domain types into API messages and back. It decides
// what users get to see: a session's password is in no message made here.
package protoconv

import (
	"maps"
	"strconv"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

// Session returns the session as the API shows it. webURI is where a browser
// finds it, empty if no gateway is known.
func Session(s *fleet.Session, webURI string) *cloudcodev1.Session {
	out := &cloudcodev1.Session{
		Name:            SessionName(s.ID),
		Uid:             s.UID,
		Etag:            Etag(s),
		CreateTime:      Time(s.CreateTime),
		UpdateTime:      Time(s.UpdateTime),
		Labels:          maps.Clone(s.Labels),
		Spec:            Spec(s.Spec),
		State:           State(s.State),
		Reason:          s.Reason,
		Message:         s.Message,
		Generation:      int64(s.Generation),
		Progress:        Progress(s.Progress),
		RestartCount:    s.RestartCount,
		ReadyTime:       Time(s.ReadyTime),
		OpencodeVersion: s.OpenCodeVersion,
		WebUri:          webURI,
		Storage:         StorageStatus(s),
	}
	if s.Assignment != nil {
		out.Node = NodeName(s.Assignment.Node)
	}
	return out
}

// Etag of a session: opaque to callers, different after every change.
func Etag(s *fleet.Session) string { return strconv.FormatUint(s.Revision, 36) }

// SessionName returns `sessions/{id}`.
func SessionName(id string) string { return "sessions/" + id }

// NodeName returns `nodes/{id}`.
func NodeName(id string) string { return "nodes/" + id }

// State as the API names it.
func State(s fleet.State) cloudcodev1.Session_State {
	return cloudcodev1.Session_State(cloudcodev1.Session_State_value[string(s)])
}

// Spec never returns nil.
func Spec(s fleet.Spec) *cloudcodev1.SessionSpec {
	out := &cloudcodev1.SessionSpec{
		Image:          s.Image,
		Env:            maps.Clone(s.Env),
		OpencodeConfig: s.OpenCodeConfig,
		NodeSelector:   maps.Clone(s.NodeSelector),
		Storage:        Storage(s.Storage),
	}
	if r := s.Resources; r != (fleet.Resources{}) {
		out.Resources = &cloudcodev1.Resources{
			CpuMillis: r.CPUMillis, MemoryBytes: r.MemoryBytes, Pids: r.PIDs, DiskBytes: r.DiskBytes,
		}
	}
	return out
}

// SpecFromProto takes nil for an empty spec. Empty maps become nil, so that equal
// specs are equal however they were sent. It leaves out the storage: what a user
// asks for there has to be decided first (see StorageRequest).
func SpecFromProto(s *cloudcodev1.SessionSpec) fleet.Spec {
	r := s.GetResources()
	return fleet.Spec{
		Image:          s.GetImage(),
		Env:            Map(s.GetEnv()),
		OpenCodeConfig: s.GetOpencodeConfig(),
		Resources: fleet.Resources{
			CPUMillis: r.GetCpuMillis(), MemoryBytes: r.GetMemoryBytes(), PIDs: r.GetPids(), DiskBytes: r.GetDiskBytes(),
		},
		NodeSelector: Map(s.GetNodeSelector()),
	}
}

// Node returns the node as the API shows it. heartbeat is the newest one known.
func Node(n *fleet.Node, heartbeat time.Time, sessions int) *cloudcodev1.Node {
	if heartbeat.IsZero() {
		heartbeat = n.HeartbeatTime
	}
	return &cloudcodev1.Node{
		Name:          NodeName(n.ID),
		CreateTime:    Time(n.CreateTime),
		Labels:        maps.Clone(n.Labels),
		State:         cloudcodev1.Node_State(cloudcodev1.Node_State_value[string(n.State)]),
		Reason:        n.Reason,
		Message:       n.Message,
		HeartbeatTime: Time(heartbeat),
		Info:          NodeInfo(n.Info),
		SessionCount:  int32(sessions),
	}
}

// NodeInfo never returns nil.
func NodeInfo(i fleet.NodeInfo) *cloudcodev1.NodeInfo {
	return &cloudcodev1.NodeInfo{
		Version: i.Version, Hostname: i.Hostname, Os: i.OS, Architecture: i.Architecture,
		KernelVersion: i.KernelVersion, ContainerRuntimeVersion: i.ContainerRuntimeVersion,
		CpuMillis: i.CPUMillis, MemoryBytes: i.MemoryBytes, DiskBytes: i.DiskBytes,
	}
}

// NodeInfoFromProto takes nil for an empty one.
func NodeInfoFromProto(i *cloudcodev1.NodeInfo) fleet.NodeInfo {
	return fleet.NodeInfo{
		Version: i.GetVersion(), Hostname: i.GetHostname(), OS: i.GetOs(), Architecture: i.GetArchitecture(),
		KernelVersion: i.GetKernelVersion(), ContainerRuntimeVersion: i.GetContainerRuntimeVersion(),
		CPUMillis: i.GetCpuMillis(), MemoryBytes: i.GetMemoryBytes(), DiskBytes: i.GetDiskBytes(),
	}
}

// Progress keeps nil.
func Progress(p *fleet.Progress) *cloudcodev1.StartProgress {
	if p == nil {
		return nil
	}
	return &cloudcodev1.StartProgress{Phase: p.Phase, Detail: p.Detail, CurrentBytes: p.Current, TotalBytes: p.Total}
}

// ProgressFromProto keeps nil.
func ProgressFromProto(p *cloudcodev1.StartProgress) *fleet.Progress {
	if p == nil {
		return nil
	}
	return &fleet.Progress{Phase: p.GetPhase(), Detail: p.GetDetail(), Current: p.GetCurrentBytes(), Total: p.GetTotalBytes()}
}

// Time returns nil for the zero time.
func Time(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// TimeFromProto returns the zero time for nil.
func TimeFromProto(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

// Map copies m; an empty one becomes nil.
func Map(m map[string]string) map[string]string {
	if len(m) == 0 {
		return nil
	}
	return maps.Clone(m)
}
