package protoconv

import (
	"slices"
	"strings"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

// StorageRequest is what a user asks for; server/storage decides what becomes of it.
type StorageRequest struct {
	Mode    fleet.StorageMode // empty: AUTO
	Profile string            // empty: the default, or S3
	Prefix  *string           // nil: the session's id
	S3      *fleet.S3
}

// StorageRequestFromProto takes nil for a request of nothing.
func StorageRequestFromProto(s *cloudcodev1.Storage) StorageRequest {
	r := StorageRequest{Profile: s.GetProfile(), S3: S3FromProto(s.GetS3())}
	if s.GetMode() != cloudcodev1.Storage_MODE_UNSPECIFIED {
		r.Mode = fleet.StorageMode(s.GetMode().String())
	}
	if s != nil && s.Prefix != nil {
		prefix := s.GetPrefix()
		r.Prefix = &prefix
	}
	return r
}

// Storage returns nil for a session that was made before there was a choice. The
// secret key is never in it.
func Storage(s fleet.Storage) *cloudcodev1.Storage {
	if s.Mode == "" {
		return nil
	}
	out := &cloudcodev1.Storage{Mode: StorageMode(s.Mode), Profile: s.Profile}
	if s.Remote() {
		prefix := s.Prefix
		out.Prefix = &prefix
	}
	if o := s.S3; o != nil {
		out.S3 = &cloudcodev1.S3Storage{
			Endpoint: o.Endpoint, Bucket: o.Bucket, AccessKeyId: o.AccessKeyID, Region: o.Region,
			PathStyle: o.PathStyle, Prefix: o.Prefix, TigrisfsArgs: o.TigrisFSArgs,
		}
	}
	return out
}

// S3FromProto keeps nil.
func S3FromProto(s *cloudcodev1.S3Storage) *fleet.S3 {
	if s == nil {
		return nil
	}
	return &fleet.S3{
		Endpoint: s.GetEndpoint(), Bucket: s.GetBucket(), AccessKeyID: s.GetAccessKeyId(), SecretAccessKey: s.GetSecretAccessKey(),
		Region: s.GetRegion(), PathStyle: s.GetPathStyle(), Prefix: s.GetPrefix(), TigrisFSArgs: s.GetTigrisfsArgs(),
	}
}

// StorageMode as the API names it.
func StorageMode(m fleet.StorageMode) cloudcodev1.Storage_Mode {
	return cloudcodev1.Storage_Mode(cloudcodev1.Storage_Mode_value[string(m)])
}

// StorageStatus says where the session's files are. What its node has said of
// that is the smaller part.
func StorageStatus(s *fleet.Session) *cloudcodev1.StorageStatus {
	st := s.Spec.Storage
	out := &cloudcodev1.StorageStatus{Mode: cloudcodev1.Storage_LOCAL, Persistent: st.Remote(), Uri: st.URI()}
	if st.Mode != "" {
		out.Mode = StorageMode(st.Mode)
	}
	if n := s.Storage; n != nil {
		out.Checkpoint, out.UnsavedSince, out.Message = Checkpoint(n.Checkpoint), Time(n.UnsavedSince), n.Message
		out.MountState = cloudcodev1.StorageStatus_MountState(cloudcodev1.StorageStatus_MountState_value[string(n.MountState)])
		out.Mounter = n.Mounter
	}
	return out
}

// StorageStatusFromProto keeps nil. It takes over what only the node knows: where
// the session is kept the server says itself.
func StorageStatusFromProto(s *cloudcodev1.StorageStatus) *fleet.StorageStatus {
	if s == nil {
		return nil
	}
	out := &fleet.StorageStatus{
		Checkpoint: CheckpointFromProto(s.GetCheckpoint()), UnsavedSince: TimeFromProto(s.GetUnsavedSince()),
		Message: s.GetMessage(), Mounter: s.GetMounter(),
	}
	if s.GetMountState() != cloudcodev1.StorageStatus_MOUNT_STATE_UNSPECIFIED {
		out.MountState = fleet.MountState(s.GetMountState().String())
	}
	return out
}

// Checkpoint keeps nil.
func Checkpoint(c *fleet.Checkpoint) *cloudcodev1.Checkpoint {
	if c == nil {
		return nil
	}
	out := &cloudcodev1.Checkpoint{
		Id: c.ID, CreateTime: Time(c.Time), Trigger: c.Trigger, Files: c.Files, Bytes: c.Bytes, UploadedBytes: c.UploadedBytes,
		OpencodeVersion: c.OpenCodeVersion, Generation: int64(c.Generation), Notes: slices.Clone(c.Notes),
	}
	if c.Node != "" {
		out.Node = NodeName(c.Node)
	}
	return out
}

// CheckpointFromProto keeps nil.
func CheckpointFromProto(c *cloudcodev1.Checkpoint) *fleet.Checkpoint {
	if c == nil {
		return nil
	}
	return &fleet.Checkpoint{
		ID: c.GetId(), Time: TimeFromProto(c.GetCreateTime()), Trigger: c.GetTrigger(), Files: c.GetFiles(), Bytes: c.GetBytes(),
		UploadedBytes: c.GetUploadedBytes(), OpenCodeVersion: c.GetOpencodeVersion(), Generation: uint64(c.GetGeneration()),
		Node: strings.TrimPrefix(c.GetNode(), "nodes/"), Notes: slices.Clone(c.GetNotes()),
	}
}
